"""The delta family: how its mixers contain each other, start, compute and refuse, and how many parameters they have."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from megaresid.attention.mixer import MIXERS
from megaresid.errors import UserError
from megaresid.model.gpt import build, canonical_parameters, canonical_rules
from megaresid.model.init import Constant, LogUniform, TimeStep
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape
from megaresid.spec import parse_pattern

SHAPE = ModelShape(layers=1, heads=2, width=16, context=48, vocab_size=40)
FAMILY = ("delta_net", "gated_delta_net", "kda")


def mixer_of(spec: str, shape: ModelShape = SHAPE, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With independent N(0, 1/2) parameters."""
    ((_, component),) = parse_pattern(spec).terms
    cls, options = MIXERS.resolve(component)
    mixer = cls(shape, options, 0).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return mixer


def inputs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 70, SHAPE.width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_gated_delta_net_without_decay_is_delta_net():
    gated, plain = mixer_of("gated_delta_net"), mixer_of("delta_net(use_gate=true)")
    shared = gated.state_dict()
    for name in ("A_log", "dt_bias", "a_proj.weight"):
        shared.pop(name)
    plain.load_state_dict(shared)
    nn.init.constant_(gated.A_log, -torch.inf)
    assert relative_error(gated(inputs(), ())[0], plain(inputs(), ())[0]) < 1e-12


def test_kda_with_one_decay_a_head_is_gated_delta_net():
    """Whose gates are then of low rank too."""
    kda, gated = mixer_of("kda"), mixer_of("gated_delta_net(output_gate_activation=sigmoid)")
    rows = kda.f_proj[1].weight.view(SHAPE.heads, -1, kda.f_proj[0].out_features)
    with torch.no_grad():
        rows.copy_(rows[:, :1].expand_as(rows).clone())
        kda.dt_bias.copy_(gated.dt_bias.repeat_interleave(8))
        kda.g_proj[1].bias.zero_()
    state = {name: tensor for name, tensor in kda.state_dict().items() if name in gated.state_dict()}
    state["dt_bias"] = gated.dt_bias
    state["a_proj.weight"] = rows[:, 0] @ kda.f_proj[0].weight
    state["g_proj.weight"] = kda.g_proj[1].weight @ kda.g_proj[0].weight
    gated.load_state_dict(state)
    assert relative_error(kda(inputs(), ())[0], gated(inputs(), ())[0]) < 1e-12


def test_the_bound_of_the_decay_is_met():
    """Whatever the logits: the decay of a token is never less than exp(lower_bound)."""
    mixer, x = mixer_of("kda(lower_bound=-2)"), 100 * inputs()
    decay = mixer.log_decay(x)
    assert decay.min() >= -2 and decay.max() <= 0
    assert decay.min() < -1.999 and decay.max() > -0.001, "the inputs do not try it"
    assert mixer_of("kda").log_decay(x).min() < -2


@pytest.mark.parametrize("spec", FAMILY)
def test_decay_and_beta_are_not_rounded_under_autocast(spec):
    """bf16 would make one number of two rates that differ by a thousandth, and has three digits for beta."""
    mixer, x = mixer_of(spec, dtype=torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        beta = mixer.beta(x)
        assert beta.dtype == torch.float32
        assert not torch.equal(beta, beta.bfloat16().float())
        if spec != "delta_net":
            nn.init.zeros_(mixer.A_log)
            before = mixer.log_decay(x)
            nn.init.constant_(mixer.A_log, 0.001)
            after = mixer.log_decay(x)
            assert before.dtype == torch.float32
            assert relative_error(after, before * math.exp(0.001)) < 1e-6


STARTS = {
    "gated_delta_net": LogUniform(0, 16),
    "kda": LogUniform(1, 16),
    "kda(lower_bound=-5)": Constant(0.0),
}


@pytest.mark.parametrize(("spec", "start"), STARTS.items(), ids=STARTS)
def test_decays_start_where_they_are_said_to(spec, start):
    """As in flash-linear-attention; and neither decays nor is rounded."""
    model = build(ModelPlan(SHAPE, spec), seed=0)
    parameters = canonical_parameters(model, model.prefixes)
    rules = canonical_rules(model, model.prefixes, model.plan)
    for name, rule in (("A_log", start), ("dt_bias", TimeStep(0.001, 0.1))):
        name = f"layers.00.attention.{name}"
        assert rules[name].start == rule and rules[name].fp32 and not rules[name].decay
    least, most = (start.low, start.high) if isinstance(start, LogUniform) else (1, 1)
    rate = parameters["layers.00.attention.A_log"].exp()
    step = softplus(parameters["layers.00.attention.dt_bias"])
    assert least - 1e-5 <= rate.min() and rate.max() <= most + 1e-5
    assert 0.00099 < step.min() and step.max() < 0.101


C, H, D = 1024, 16, 64
CONVOLUTIONS = 3 * 4 * C
COUNTS = {
    "delta_net": 4 * C * C + C * H + CONVOLUTIONS + D,
    "delta_net(use_beta=false, use_short_conv=false)": 4 * C * C + D,
    "gated_delta_net": 5 * C * C + 2 * C * H + 2 * H + CONVOLUTIONS + D,
    "gated_delta_net(heads=12, head_dim=64)": 5 * 768 * C + 2 * C * 12 + 2 * 12 + 3 * 4 * 768 + D,
    "kda": 4 * C * C + 2 * (C * D + D * C) + 2 * C + C * H + H + CONVOLUTIONS + D,
}
"""q, k, v, o; beta and the decay; kernels of 4; one norm for all heads."""


@pytest.mark.parametrize(("spec", "count"), COUNTS.items(), ids=COUNTS)
def test_parameters_at_the_width_of_gpt2_medium(spec, count):
    plan = ModelPlan(ModelShape(layers=1, heads=H, width=C, context=1024), spec)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in plan.mixer_of(0).parameters()) == count


REFUSED = {
    "delta_net(heads=3)": "'delta_net': expand_k=1 of width 16 is 16, which 3 heads do not divide: change heads or",
    "delta_net(expand_v=0.3)": "attention 'delta_net': expand_v=0.3 of width 16 is 4.8, which 2 heads do not divide",
    "delta_net(num_heads=2)": "has no option 'num_heads'",
    "delta_net(qk_norm=l1)": "qk_norm=\"?l1\"? is not valid",
    "delta_net(conv_size=0)": "conv_size=0 is not valid",
    "gated_delta_net(heads=3)": "width 16 is not divisible by heads=3: change heads or give head_dim",
    "gated_delta_net(expand_v=0.3)": "expand_v=0.3 of head_dim 8 is 2.4, not a whole number: change one of them",
    "gated_delta_net(heads=4, num_v_heads=6)": "num_v_heads=6 is not a multiple of heads=4: change one of them",
    "kda(heads=2, num_v_heads=1)": "attention 'kda': num_v_heads=1 is not a multiple of heads=2",
    "kda(lower_bound=0)": "lower_bound=0 is not valid",
    "kda(use_gate=false)": "has no option 'use_gate'",
}


@pytest.mark.parametrize(("spec", "message"), REFUSED.items(), ids=REFUSED)
def test_options_that_do_not_fit_are_refused_with_the_mend(spec, message):
    with pytest.raises(UserError, match=message):
        ModelPlan(SHAPE, spec)
