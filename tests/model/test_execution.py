"""Ways of running the same model: recomputation, compilation, autocast, dropout, side channel."""

import sys
import types

import pytest
import torch

from megaresid.attention.softmax import Softmax
from megaresid.model.compile import compile_model
from megaresid.model.gpt import build, canonical_parameters
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape

SHAPE = ModelShape(layers=3, heads=2, width=32, context=24, vocab_size=150)
IDX = torch.randint(150, (2, 25), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model, call=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    _, loss = (model if call is None else call)(IDX[:, :-1], IDX[:, 1:])
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in canonical_parameters(model, model.prefixes).items()}
    model.zero_grad()
    return loss.detach(), gradients


def away_from_initialisation(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in canonical_parameters(model, model.prefixes).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        model.head.weight[SHAPE.vocab_size :] = 0
    return model


def model_of(shape=SHAPE, **options):
    return away_from_initialisation(build(ModelPlan(shape), seed=0, **options))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_no_bit(dropout):
    """With dropout too: the recomputation draws the same mask again."""
    shape = SHAPE.model_copy(update={"dropout": dropout})
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        found.append(loss_and_gradients(model_of(shape, activation_checkpointing=recompute)))
    (loss, gradients), (other_loss, other_gradients) = found
    assert torch.equal(loss, other_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name


def test_activation_checkpointing_keeps_only_the_layers_inputs():
    """One [B, T, C] a layer, against the many of a plain run."""
    sizes = {}
    for recompute in (False, True):
        model, saved = model_of(activation_checkpointing=recompute), {}
        layers = torch.nn.Sequential(*[part for part in model.parts[2:-1]])
        owned = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in owned:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(2, 24, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = layers(x)
        sizes[recompute] = sum(saved.values())
        del output
    assert sizes[True] == SHAPE.layers * 2 * 24 * 32 * 4
    assert sizes[False] > 10 * sizes[True]


def compiled_equals_eager(backend: str) -> None:
    model = model_of()
    loss, gradients = loss_and_gradients(model)
    torch._dynamo.reset()
    compiled = compile_model(model, fullgraph=True, backend=backend)
    compiled_loss, compiled_gradients = loss_and_gradients(model, compiled)
    assert compiled_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_whole_model_is_one_graph():
    compiled_equals_eager("aot_eager")


@pytest.mark.full
def test_the_whole_model_compiles_with_inductor():
    compiled_equals_eager("inductor")


def test_bf16_autocast_keeps_the_loss_and_the_stream_in_fp32():
    model = model_of()
    exact = model(IDX[:, :-1], IDX[:, 1:])[1]
    streams = []
    model.parts[3].register_forward_hook(lambda module, inputs, outputs: streams.append(outputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDX[:, :-1], IDX[:, 1:])[1]
    assert loss.dtype == torch.float32 and streams == [torch.float32]
    assert 0 < abs(loss - exact) < 2e-2 * exact  # bf16 has 8 bits


@pytest.mark.parametrize("attention", ["softmax", "gla", "delta_net", "blend(gla, causal_conv)"])
def test_dropout_of_a_mixers_output_is_every_mixers(attention):
    """The embedding's and the MLP's apart: all that differs between two passes is what the mixers gave."""
    model = build(ModelPlan(SHAPE.model_copy(update={"dropout": 0.3}), attention), seed=0)
    layer, x = model.parts[2], torch.randn(2, 5, SHAPE.width, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    first, second = (layer._mix(x, ())[0] for _ in range(2))
    assert not torch.equal(first, second)
    kept = (first != 0).float().mean()
    assert 0.6 < kept < 0.8
    assert torch.equal(layer.eval()._mix(x, ())[0], layer.attention(x, ())[0])


def test_dropout_acts_in_training_alone():
    model = model_of(SHAPE.model_copy(update={"dropout": 0.3}))
    plain = model_of()
    assert torch.equal(model.eval()(IDX[:, :-1])[0], plain.eval()(IDX[:, :-1])[0])
    model.train()
    torch.manual_seed(0)
    first, second = (model(IDX[:, :-1])[0] for _ in range(2))
    assert not torch.allclose(first, second)


class Remembering(Softmax):
    """A user's mixer: from layer 1 on it adds what layer 0 shared over the side channel."""

    reads = ("first_output",)

    @classmethod
    def side_spec(cls, shape, options, entering):
        return entering or (("first_output", (shape.width,)),)

    def forward(self, x, side):
        y, _ = super().forward(x, side)
        return (y, (y,)) if not side else (y + side[0], side)


def test_a_users_mixer_is_named_by_its_import_path_and_shares_over_depth(monkeypatch):
    module = types.ModuleType("my_mixers")
    module.Remembering = Remembering
    monkeypatch.setattr(Remembering, "__module__", "my_mixers")
    monkeypatch.setitem(sys.modules, "my_mixers", module)
    plan = ModelPlan(SHAPE, attention="my_mixers:Remembering")
    assert plan.tree()["layers"][0]["attention"]["name"] == "my_mixers:Remembering"
    assert plan.hash != ModelPlan(SHAPE).hash
    model = away_from_initialisation(build(plan, seed=0))
    vanilla = model_of()
    closed = []
    monkeypatch.setattr(model.parts[-1], "close", lambda state: closed.append(len(state)) or state[0])
    inputs = []
    for layer in range(SHAPE.layers):
        model.parts[2 + layer].register_forward_hook(lambda module, given, output: inputs.append(output))
    shared = []
    model.parts[2].attention.register_forward_hook(lambda module, given, output: shared.append(output[0]))
    logits = model(IDX[:, :-1])[0]
    assert [len(output) for output in inputs] == [2, 2, 1], "the last layer has no reader after it"
    assert torch.equal(inputs[1][1], shared[0])
    assert closed == [1], "the side channel reached the end of the stream as state"
    assert not torch.allclose(logits, vanilla(IDX[:, :-1])[0])


def test_attention_is_causal():
    """Changing token t changes no logit before t, bitwise, and some logit from t on."""
    model = model_of().eval()
    before = model(IDX[:1, :-1])[0]
    for t in (0, 7, 23):
        changed = IDX[:1, :-1].clone()
        changed[0, t] = (changed[0, t] + 1) % SHAPE.vocab_size
        after = model(changed)[0]
        assert torch.equal(after[0, :t], before[0, :t])
        assert not torch.equal(after[0, t:], before[0, t:])
