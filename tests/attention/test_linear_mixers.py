"""What the table of mixers does not ask of the linear ones: bad options, sizes, and numbers at their limits."""

import math

import fla_mamba2
import interpreter
import pytest
import torch
from mixer_models import Mixers, inputs
from mixer_row import Row

from megaresid.attention import projections
from megaresid.attention.hgrn2 import HGRN2
from megaresid.attention.mixer import MIXERS
from megaresid.errors import UserError
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS, ModelShape
from megaresid.spec import parse_pattern

SHAPE = ModelShape(layers=2, heads=2, width=32, context=16)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gla(expand=1)", "'gla' has no option 'expand': did you mean 'expand_"),
        ("gla(heads=3)", "'gla': expand_k=0.5 of width 32 is 16, which 3 heads do not divide: change"),
        ("retention(expand_v=0.3)", "'retention': expand_v=0.3 of width 32 is 9.6, which 2 heads do not divide"),
        ("lightning(heads=0)", "'lightning': heads=0 is not valid"),
        ("simple_gla(feature_map=tanh)", "'simple_gla': feature_map=tanh is not valid.*'relu'"),
        ("gla(clamp_min=0.1)", "'gla': clamp_min=0.1 is not valid"),
        ("retention(heads=16)", "keys of a head have width 1, and only an even one can be rotated: change heads"),
        ("linear_attention(feature_map=silu, normalize=true)", "normalize=true.*feature_map=silu: leave it out"),
        ("linear_attention(feature_map=hedgehog)", "feature_map=hedgehog is not valid.*'elu_plus_one'"),
        ("hgrn2(expand_ratio=5)", "expand_ratio=5 is the width of a head, and width 32 is not a multiple of it"),
        ("hgrn2(expand_ratio=8, heads=2)", "is the width of a head, and width 32 is not 2 times it: change it"),
        ("mamba2(heads=3)", "'mamba2': expand=1.25 of width 32 is 40, which 3 heads do not divide: change heads or"),
    ],
)
def test_what_does_not_fit_is_one_line_that_says_the_mend(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        ModelPlan(SHAPE, spec)
    assert "\n" not in str(caught.value)


C, H = 1024, 16
COUNTS = {
    "linear_attention": 4 * C * C,
    "linear_attention(feature_map=silu)": 4 * C * C + C // H,
    "retention": 2 * C * C // 2 + 3 * C * C + C // H,
    "lightning": 2 * C * C // 2 + 3 * C * C + C // H,
    "simple_gla": 2 * C * C // 2 + 3 * C * C + C // H + 4 * (C // 2 + C // 2 + C) + (C + 1) * H,
    "gla": 2 * C * C // 2 + 3 * C * C + C // H + 16 * C + (16 + 1) * C // 2,
    "hgrn2": 4 * C * C + C,
    "mamba2": 3 * 1280 * C + 2 * 128 * C + H * C + (4 + 1) * (1280 + 2 * 128) + 3 * H + 1280,
}


@pytest.mark.parametrize("spec", COUNTS)
def test_parameters_are_within_a_hundredth_of_softmax_attentions(spec):
    """At 24 layers of width 1024; counted by hand from the shapes."""
    ((_, component),) = parse_pattern(spec).terms
    cls, options = MIXERS.resolve(component)
    with torch.device("meta"):
        mixer = cls.make(PRESETS["gpt2-medium"], options, 0)
    assert sum(parameter.numel() for parameter in mixer.parameters()) == COUNTS[spec]
    assert abs(COUNTS[spec] / (4 * C * C) - 1) < 0.01


@pytest.mark.parametrize("feature_map", ["elu_plus_one", "relu"])
def test_a_normalised_output_is_a_mean_of_the_values(feature_map):
    """Of equal values it is that value, at every token that sees any other; the epsilon is all that is missing."""
    row = Row(f"linear_attention(feature_map={feature_map})", None, heads=1)
    mixers = Mixers(row)
    ((mixer,), x) = mixers.mixers, inputs(row)
    constant = inputs(row, length=1).expand_as(x)
    y, mean = mixers((x, x, constant)), mixer.o_proj(mixer.v_proj(constant))
    assert (y - mean).abs().max() < 1e-4 * mean.abs().max()


@pytest.mark.parametrize("layer", [0, 1], ids=["no bound", "bound"])
def test_hgrn2_keeps_small_keys_and_small_decays_exact(layer):
    """1 - f where f rounds to 1 and log f where f rounds to 0, in fp32; the bound of two layers is 0, then 1/2."""
    ((_, component),) = parse_pattern("hgrn2").terms
    mixer, bound = HGRN2(SHAPE, MIXERS.resolve(component)[1], layer), layer / 2
    logits = torch.tensor([-1000.0, -100.0, -30.0, -1.0, 0.0, 1.0, 30.0, 80.0], requires_grad=True)
    k, g = mixer.input_and_decay(logits)
    for logit, key, decay in zip(logits.tolist(), k.tolist(), g.tolist()):
        lost = 1 / (1 + math.exp(min(logit, 700)))  # 1 - sigmoid
        log_sigmoid = logit - math.log1p(math.exp(logit)) if logit < 0 else -math.log1p(math.exp(-logit))
        exact = log_sigmoid if bound == 0 else math.log1p(-(1 - bound) * lost)
        assert key == pytest.approx((1 - bound) * lost, rel=1e-6, abs=0)
        assert decay == pytest.approx(exact, rel=1e-6, abs=0)
    (gradient,) = torch.autograd.grad((k + g).sum(), logits)
    assert gradient.isfinite().all()


DECAYING = ("retention", "lightning", "simple_gla", "gla", "hgrn2", "mamba2")


@pytest.mark.parametrize("spec", DECAYING)
def test_decays_stay_wide_under_autocast(spec, monkeypatch):
    """And equal those of fp32, but for what the products that make them round."""
    seen = []

    def spy(q, k, v, g=None, beta=None, **keywords):
        seen.append((q, k, v, g))
        return recurrence(q, k, v, g, beta, **keywords)

    recurrence = projections.recurrence
    monkeypatch.setattr(projections, "recurrence", spy)
    row = Row(spec, None)
    mixers, x = Mixers(row, dtype=torch.float32), inputs(row).float()
    y = mixers(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mixers(x)
    (*_, expected), (q, k, v, g) = seen
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and g.dtype == torch.float32
    assert (g - expected).abs().max() <= 0.02 * expected.abs().max()
    assert rounded.dtype == torch.bfloat16 and (rounded - y).abs().max() < 0.05 * y.abs().max()


@pytest.mark.parametrize("spec", ["simple_gla", "gla", "hgrn2", "mamba2"])
def test_extreme_gates_leave_outputs_and_gradients_finite(spec):
    """Logits of some hundreds to both sides, over more than one chunk, in fp32."""
    row = Row(spec, None)
    mixers, x = Mixers(row, dtype=torch.float32), inputs(row, 70, batch=1).float().requires_grad_()
    gates = [p for name, p in mixers.parameters().items() if name.startswith(("gk_proj", "f_proj", "dt_proj"))]
    with torch.no_grad():
        for parameter in gates:
            parameter *= 500
    y = mixers(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *gates])
    assert y.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("spec", ["linear_attention", "retention", "simple_gla", "mamba2"])
def test_a_prompt_of_more_than_a_chunk_is_carried_on(spec):
    """Normaliser, position, convolution and state; gla stands in the table's test of this."""
    row = Row(spec, None)
    mixers, x = Mixers(row), inputs(row, 141, batch=1)
    whole, caches = mixers(x), mixers.caches(141)
    found = torch.cat([mixers(piece, None, caches) for piece in x.split((70, 1, 1, 67, 1, 1), 1)], 1)
    assert (found - whole).abs().max() < 1e-10 * whole.abs().max()


@pytest.mark.full
@pytest.mark.skipif(bool(interpreter.MISSING), reason=interpreter.REASON)
def test_mamba2_is_the_real_layer():
    """Outputs and gradients of flash-linear-attention's Mamba-2: a scan in plain PyTorch, a norm in Triton."""
    process = interpreter.Interpreter()
    try:
        found = process.run(fla_mamba2.errors)
    finally:
        process.close()
    assert all(error < 2e-5 for error in found.values()), found
