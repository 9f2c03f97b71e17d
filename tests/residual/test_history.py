"""What is known of variants that keep a history over depth: what they carry, and the traps of a softmax over depth."""

import importlib.util
from functools import cache

import pytest
import torch
from small_models import IDX, SHAPE, gradients_of, loss_of, model_of
from variant_models import layer_norm

from megaresid.model.gpt import canonical_parameters
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS
from megaresid.residual.attention_residuals import DepthSoftmax, DepthSum
from megaresid.residual.kernels import fused_attnres

DEEP = SHAPE.model_copy(update={"layers": 24})
INPUT = IDX[:, :-1]


def names(spec: str, index: int, shape=SHAPE) -> list[str]:
    return [entry.name for entry in ModelPlan(shape, residual=spec).residual_of(0).state_spec(index)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_the_dense_former_of_the_paper_has_324_and_its_4x5_form_15_weights():
    """At 24 layers, whatever the width."""
    for spec, count in (("dense_former", 324), ("dense_former(dilation=4, period=5)", 15)):
        variant = ModelPlan(DEEP, residual=spec).residual_of(0)
        sites = [variant.site(place) for layer in range(24) for place in variant.places(layer)]
        assert sum(p.numel() for site in sites for name, p in site.named_parameters() if "norm" not in name) == count


def test_a_dense_former_carries_what_a_later_average_needs_and_no_tensor_twice():
    """Layers 2 and 4 are averaged, over X_0 X_2 and X_0 X_2 X_4."""
    spec = "dense_former(dilation=2, period=2)"
    assert [names(spec, index) for index in range(9)] == [
        ["x"],  # is X_0
        ["x", "x0"],
        ["x", "x0"],  # X_1, which no average needs
        ["x", "x0"],
        ["x", "x0", "block2"],  # Y_2, not X_2
        ["x", "x0", "block2"],
        ["x", "x0", "block2"],
        ["x", "x0", "block2"],
        ["x"],
    ]


def test_a_dense_former_carries_nothing_that_its_dilation_steps_over():
    """Only layer 3 is averaged, over X_1 and X_3: X_1 is the stream, and kept when that goes on."""
    spec = "dense_former(dilation=2, period=3)"
    assert [names(spec, index) for index in range(9)] == [
        *([["x"]] * 3),
        *([["x", "block1"]] * 3),
        *([["x"]] * 3),
    ]


def test_mudd_former_carries_the_history_alone_between_layers():
    """A stream beside it would be read by no later layer, and so have no gradient: a pipeline cut there breaks."""
    for layer in range(SHAPE.layers + 1):
        assert names("mudd_former", 2 * layer) == ["x0", *(f"block{block}" for block in range(1, layer + 1))]


def test_mudd_formers_ways_differ_and_each_reaches_the_logits():
    model = model_of("mudd_former")
    before = model(INPUT)[0]
    static = canonical_parameters(model, model.prefixes)["layers.02.attention.site.aggregate.static"]
    outputs = []
    for way in range(4):
        with torch.no_grad():
            static[way, 0] += 1
            outputs.append(model(INPUT)[0])
            static[way, 0] -= 1
    everything = [before, *outputs]
    for i, one in enumerate(everything):
        for other in everything[:i]:
            assert relative(one, other) > 1e-6


def test_blocks_of_attention_residuals_are_sums_of_so_many_outputs():
    spec = "block_attention_residuals(block_size=3)"
    assert names(spec, 4) == ["x0", "y0-2", "y3"]
    assert names(spec, 6) == ["x0", "y0-2", "y3-5"]
    assert names(spec, 8) == ["x0", "y0-2", "y3-5", "y6-7"]
    medium = PRESETS["gpt2-medium"]
    assert len(names("block_attention_residuals", 48, medium)) == 9
    assert len(names("attention_residuals", 48, medium)) == 49


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_blocks_of_one_sublayer_are_the_full_form(scale):
    """Their states are the same too, so the two may follow each other."""
    full, blocks = f"attention_residuals(scale={scale})", f"block_attention_residuals(block_size=1, scale={scale})"
    expected = model_of(full)(INPUT)[0]
    assert torch.equal(model_of(blocks)(INPUT)[0], expected)
    assert torch.equal(model_of(f"{full} + {blocks}")(INPUT)[0], expected)


def random_sources(count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    return tuple(10**n * torch.randn(2, 3, 8, generator=generator, dtype=torch.float64) for n in range(count))


def depth(cls, query: torch.Tensor, key_scale: torch.Tensor):
    module = cls(8).double()
    with torch.no_grad():
        module.query.copy_(query)
        module.key_scale.copy_(key_scale)
    return module


def test_equal_scores_make_the_mean_or_the_sum_whatever_the_sources_size():
    sources = random_sources(4)
    mean, total = (depth(cls, torch.zeros(8), torch.full((8,), 3.0)) for cls in (DepthSoftmax, DepthSum))
    assert relative(mean(sources), sum(sources) / 4) < 1e-15
    assert relative(total(sources), sum(sources)) < 1e-15


def test_the_softmax_over_depth_looks_at_the_direction_of_a_source_and_returns_its_values_unnormed():
    generator = torch.Generator().manual_seed(0)
    softmax = depth(DepthSoftmax, torch.randn(8, generator=generator), torch.randn(8, generator=generator))
    a, b = random_sources(2)
    weights = softmax.weights((a, b))
    assert relative(weights.sum(0), torch.ones_like(weights[0])) < 1e-15
    assert relative(softmax.weights((5 * a, b)), weights) < 1e-5  # to the epsilon of the keys' norm
    large = depth(DepthSoftmax, 1000 * a[0, 0] / a[0, 0].norm(), torch.ones(8))
    assert relative(large((a, -a))[0, 0], a[0, 0]) < 1e-12, "all weight on one source gives that source"


@cache
@torch.no_grad()
def first_logits(spec: str, epsilon: float = 1e-5) -> torch.Tensor:
    """Of 24 layers at GPT-2's initial values, in fp64."""
    return model_of(spec, DEEP.model_copy(update={"norm_epsilon": epsilon}), away=0)(INPUT)[0]


def deviation_from_vanilla(spec: str) -> float:
    return relative(first_logits(spec), first_logits("vanilla"))


def test_zero_queries_deviate_by_the_epsilon_of_the_norms():
    """The stream is divided by the number of sources, up to 49, and 49^2 x 1e-5 drowns a variance of 8e-4."""
    assert deviation_from_vanilla("attention_residuals(norm_epsilon=1e-5)") > 0.5
    assert deviation_from_vanilla("block_attention_residuals(norm_epsilon=1e-5)") > 0.1
    assert deviation_from_vanilla("attention_residuals(scale=sum)") < 1e-12
    assert deviation_from_vanilla("block_attention_residuals(scale=sum)") < 1e-12


def test_zero_queries_are_vanilla_whose_epsilons_are_multiplied_by_the_square_of_the_number_of_sources():
    """To rounding, in logits and in the gradient of every weight of a sublayer: this is all that happens."""
    found, expected = (model_of(s, DEEP, away=0) for s in ("attention_residuals(norm_epsilon=1e-5)", "vanilla"))
    sites = [site for part in expected.parts[2:-1] for site in part.sites.values()]
    for index, site in enumerate(sites):
        site.norm.eps = (index + 1) ** 2 * 1e-5
    expected.parts[-1].norm.eps = (2 * DEEP.layers + 1) ** 2 * 1e-5
    assert relative(found(INPUT)[0], expected(INPUT)[0]) < 1e-12
    gradients, expected_gradients = (gradients_of(model, loss_of(model)) for model in (found, expected))
    weights = [name for name in expected_gradients if name.endswith("proj.weight") or name.endswith("mlp.fc.weight")]
    assert len(weights) == 6 * DEEP.layers
    for name in weights:
        assert relative(gradients[name], expected_gradients[name]) < 1e-9, name


def test_the_default_epsilon_brings_the_mean_back_to_vanilla():
    """Against vanilla with the same small epsilon; the model's own is left to the others."""
    assert relative(first_logits("attention_residuals"), first_logits("vanilla", epsilon=1e-12)) < 1e-5


@pytest.mark.parametrize(
    "spec", ["attention_residuals", "block_attention_residuals(block_size=3)", "delta_attention_residuals"]
)
def test_there_is_nothing_to_route_before_the_first_sublayer(spec):
    """A softmax over one source is 1, its parameters would never have a gradient."""
    model = model_of(spec)
    routed = {
        name.split(".depth.")[0] for name in canonical_parameters(model, model.prefixes) if ".depth." in name
    }
    sites = [f"layers.{layer:02d}.{kind}.site" for layer in range(SHAPE.layers) for kind in ("attention", "mlp")]
    closed = {"head"} if spec != "delta_attention_residuals" else set()
    assert routed == {*sites[1:], *closed}


def test_delta_attention_residuals_route_over_the_parts_of_the_stream():
    """With gamma at 1 and equal scores a site reads (1 + 1 / sources) times the stream."""
    model = model_of("delta_attention_residuals")
    site = model.parts[3].sites["attention"]
    with torch.no_grad():
        site.depth.query.zero_()
        site.depth.gamma.fill_(1.0)
    sources = tuple(torch.randn(2, 4, SHAPE.width, dtype=torch.float64) for _ in range(3))
    stream = sum(sources)
    normed, _ = site.enter(sources)
    assert relative(normed, layer_norm(stream * (1 + 1 / 3), dict(site.named_parameters()))) < 1e-12


@pytest.mark.parametrize("spec", ["attention_residuals", "delta_attention_residuals", "block_attention_residuals"])
def test_sums_of_outputs_are_not_rounded_to_bf16_under_autocast(spec):
    """A sublayer's output is bf16 there; a source stands in the stream's precision, as what is added to it."""
    model = model_of(spec, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state, _ = model.parts[2].sites["attention"](
            (torch.randn(2, 4, SHAPE.width),), (), lambda x, side: (x.bfloat16(), side)
        )
    assert {tensor.dtype for tensor in state} == {torch.float32}


@pytest.mark.parametrize(
    "found, installed", [(set(), False), ({"fla"}, False), ({"fla", "fla.ops.attnres"}, True)], ids=["no", "old", "new"]
)
def test_the_kernel_counts_as_installed_where_fla_has_it(found, installed, monkeypatch):
    def find_spec(name: str) -> str | None:
        if name.partition(".")[0] not in found:
            assert name == "fla", "a submodule of what is not there raises ModuleNotFoundError"
        return name if name in found else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert fused_attnres._installed.__wrapped__() == installed
