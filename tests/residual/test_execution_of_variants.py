"""Every variant under every way of running one model: recomputation, bf16 autocast, compilation; and on each token alone.

Away from initialisation, where nothing is hidden behind a zero.
"""

import pytest
import torch
from compiled import assert_compiles_to_one_graph
from small_models import IDX, SHAPE, gradients_of, loss_of, model_of
from torch import nn
from torch.utils._pytree import tree_leaves
from variant_table import FAMILY_HEADS, ROWS, quick

from megaresid.model.gpt import canonical_rules
from megaresid.model.layer import Layer

QUICKLY_COMPILED = ("vanilla",)
DEEP_HISTORIES = ("attention_residuals", "delta_attention_residuals", "mudd_former", "dense_former")


class TokenWise(nn.Module):
    """Stands for a sublayer: acts on each token alone, and no autocast rounds it."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("scale", 1 + 0.3 * torch.randn(SHAPE.width, generator=generator))

    def forward(self, x, side):
        return torch.tanh(self.scale * (sum(x) if isinstance(x, tuple) else x)), side


def token_wise_model(row, dtype: torch.dtype):
    model = model_of(row.spec, dtype=dtype, step=row.step)
    layers = [part for part in model.parts if isinstance(part, Layer)]
    for index, layer in enumerate(layers):
        layer.attention, layer.mlp = TokenWise(2 * index).to(dtype), TokenWise(2 * index + 1).to(dtype)
    return model


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_acts_on_each_token_alone(row):
    model, token = token_wise_model(row, torch.float64), 3
    idx = IDX[:, :-1].clone()
    before = model(idx)[0]
    idx[:, token] = (idx[:, token] + 1) % SHAPE.vocab_size
    changed = (model(idx)[0] != before).any(-1)
    assert changed[:, token].all()
    assert not changed[:, :token].any() and not changed[:, token + 1 :].any()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_activation_checkpointing_changes_no_bit(row):
    found = []
    for recompute in (False, True):
        model = model_of(row.spec, dtype=torch.float32, step=row.step, recompute=recompute)
        loss = loss_of(model)
        found.append((loss, gradients_of(model, loss)))
    (loss, gradients), (other_loss, other_gradients) = found
    assert torch.equal(loss, other_loss)
    for name, gradient in gradients.items():
        if gradient is None:
            assert other_gradients[name] is None, name
        else:
            assert torch.equal(gradient, other_gradients[name]), name


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_under_bf16_autocast_streams_stay_fp32_and_the_loss_is_close(row):
    model = model_of(row.spec, away=0.05, dtype=torch.float32, step=row.step)
    exact = loss_of(model)
    streams = []
    for part in model.parts[1:]:
        part.register_forward_hook(
            lambda module, inputs, state: streams.extend([state] if torch.is_tensor(state) else state)
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    assert loss.dtype == torch.float32 and {stream.dtype for stream in streams} == {torch.float32}
    assert 0 < abs(loss - exact) < 1e-2 * exact


def calls_of(model, idx) -> list[tuple[str, nn.Module, tuple]]:
    """Canonical prefix, module and inputs of all that owns parameters of the residual scheme."""
    calls = [(f"{model.prefixes[1]}.opening", model.parts[1].opening), (model.prefixes[-1], model.parts[-1])]
    for prefix, part in zip(model.prefixes, model.parts):
        for kind, site in getattr(part, "sites", {}).items():
            calls.append((f"{prefix}.{kind}.site", site))
    inputs = {}
    handles = [
        module.register_forward_pre_hook(lambda module, given: inputs.__setitem__(module, given))
        for _, module in calls
    ]
    model(idx)
    for handle in handles:
        handle.remove()
    return [(prefix, module, inputs[module]) for prefix, module in calls]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_no_coefficient_is_rounded_to_bf16_under_autocast(row):
    """A coefficient is set to a bf16 number and then moved by 1/1000 of itself: rounded to bf16 it would not move.

    The sites run alone, each on its own input, with sublayers that autocast leaves in fp32; what they give must move as
    it does without autocast.
    """
    model = token_wise_model(row, torch.float32)
    rules = canonical_rules(model, model.prefixes, model.plan)
    with torch.no_grad():
        for prefix, module, given in calls_of(model, IDX[:, :-1]):
            for local, parameter in module.named_parameters():
                if not rules[f"{prefix}.{local}"].fp32:
                    continue
                moved = {}
                rounded = parameter.bfloat16().float()
                for autocast in (False, True):
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                        parameter.copy_(rounded)
                        before = tree_leaves(module(*given))
                        parameter.copy_(rounded * 1.001)
                        assert torch.equal(parameter.bfloat16().float(), rounded)
                        after = tree_leaves(module(*given))
                    moved[autocast] = torch.cat([(b - a).flatten() for a, b in zip(before, after)])
                parameter.copy_(rounded)
                assert moved[False].norm() > 0, f"{prefix}.{local} moves nothing"
                error = (moved[True] - moved[False]).norm() / moved[False].norm()
                assert error < 0.2, f"{prefix}.{local}"


def compiled_equals_eager(row, layers: int, dtype: torch.dtype, tolerance: float, **options) -> None:
    model = model_of(row.spec, SHAPE.model_copy(update={"layers": layers}), dtype=dtype, step=row.step)
    assert_compiles_to_one_graph(model, tolerance, **options)


@pytest.mark.parametrize("row", quick(FAMILY_HEADS), ids=str)
def test_the_whole_model_is_one_graph(row):
    compiled_equals_eager(row, 3, torch.float64, 1e-9, backend="eager")


@pytest.mark.full
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_whole_model_is_one_graph_backwards_too(row):
    compiled_equals_eager(row, SHAPE.layers, torch.float64, 1e-9, backend="aot_eager")


@pytest.mark.parametrize("row", quick([row for row in FAMILY_HEADS if row.spec in QUICKLY_COMPILED]), ids=str)
def test_the_whole_model_compiles_with_inductor(row):
    """All kernels in one file of C++ and not optimized: most of the time is the compiler's."""
    options = {"cpp_wrapper": True, "aot_inductor.debug_compile": True}
    compiled_equals_eager(row, row.layers, torch.float32, 1e-4, options=options)


@pytest.mark.full
@pytest.mark.parametrize("row", [row for row in ROWS if row.spec in DEEP_HISTORIES], ids=str)
def test_a_deep_history_is_one_graph(row):
    """24 layers, each with another number of tensors in its state, and not one recompilation allowed."""
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled_equals_eager(row, 24, torch.float64, 1e-9, backend="aot_eager")
