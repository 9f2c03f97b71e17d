"""How the parameters of mixers start that are no linear maps, by their authors, and how the optimizer treats them."""

import pytest
import torch
from mixer_models import shape_of
from mixer_row import Row
from torch import nn

from megaresid.attention.short_convolution import ShortConvolution
from megaresid.model.gpt import build, canonical_parameters, canonical_rules
from megaresid.model.init import Constant, LogUniform, Rule, TimeStep, Uniform
from megaresid.model.plan import ModelPlan


def own_rule(start) -> Rule:
    return Rule(start, decay=False, fp32=True)


WEIGHT, BIAS = Rule(Uniform(0.5), decay=True), Rule(Constant(0.0), decay=False)
STARTS = {
    "mamba2": {
        "A_log": own_rule(LogUniform(1, 16)),
        "dt_bias": own_rule(TimeStep(0.001, 0.1)),
        "D": own_rule(Constant(1.0)),
        "v_conv1d.weight": WEIGHT,
        "v_conv1d.bias": BIAS,
    },
    "gated_delta_net(conv_bias=true)": {"q_conv1d.weight": WEIGHT, "k_conv1d.bias": BIAS},
    "causal_conv(kernel=16)": {"conv1d.weight": Rule(Uniform(0.25), decay=True)},
}


@pytest.mark.parametrize(("spec", "starts"), STARTS.items(), ids=STARTS)
def test_every_parameter_has_the_start_of_its_paper(spec, starts):
    plan = ModelPlan(shape_of(Row(spec, None)), spec)
    model = build(plan, seed=0)
    rules, parameters = canonical_rules(model, model.prefixes, plan), canonical_parameters(model, model.prefixes)
    for name, rule in starts.items():
        name = f"layers.00.attention.{name}"
        assert rules[name] == rule, name
        if isinstance(rule.start, Constant):
            assert (parameters[name] == rule.start.value).all(), name


@pytest.mark.parametrize("kernel", [2, 4, 9])
def test_a_short_convolution_starts_as_pytorchs_does(kernel):
    ours = ShortConvolution(4096, kernel).parameter_rules()["weight"].start
    torch.manual_seed(0)
    theirs = nn.Conv1d(4096, 4096, kernel, groups=4096).weight.detach()
    drawn = ours.draw(theirs.shape, torch.Generator().manual_seed(1))
    for measure in (torch.std, lambda x: x.abs().max()):
        assert measure(drawn).item() == pytest.approx(measure(theirs).item(), rel=0.03)
    assert abs(drawn.mean()) < 5 * theirs.std() / theirs.numel() ** 0.5
