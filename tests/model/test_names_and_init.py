"""Canonical names, initial values and optimizer groups."""

import math

import pytest
import torch
from torch import nn

from megaresid.attention.softmax import Softmax
from megaresid.config import OptimizerOptions
from megaresid.model.gpt import build, canonical_name, canonical_parameters, canonical_rules
from megaresid.model.init import Constant, LogUniform, Normal, Rule, TimeStep, Uniform, fill, generator_for
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape
from megaresid.training.optimizer import parameter_groups, set_learning_rate

SHAPE = ModelShape(layers=2, heads=2, width=64, context=32, vocab_size=200)


@pytest.fixture(scope="module")
def model():
    return build(ModelPlan(SHAPE), seed=5)


def test_names_of_one_layer(model):
    names = [name for name in canonical_parameters(model, model.prefixes) if name.startswith("layers.01.")]
    projections = [f"attention.{x}_proj" for x in "qkvo"] + ["mlp.fc", "mlp.proj"]
    sites = ["attention.site.norm", "mlp.site.norm"]
    assert sorted(names) == sorted(f"layers.01.{x}.{what}" for x in projections + sites for what in ("weight", "bias"))


def test_a_pipeline_gives_the_same_names():
    prefixes = ["embed.tokens", "embed", "layers.00", "layers.01", "head"]
    for plain, pipeline in (
        ("parts.0.weight", "tied_modules.tokens.weight"),
        ("parts.1.positions.weight", "1.positions.weight"),
        ("parts.3.sites.mlp.norm.bias", "3.sites.mlp.norm.bias"),
        ("parts.4.norm.weight", "4.norm.weight"),
    ):
        assert canonical_name(plain, prefixes) == canonical_name(pipeline, prefixes)


def test_every_parameter_has_its_declared_distribution(model):
    """Mean and standard deviation within five standard errors of GPT-2's values."""
    depth_scaled = 0.02 / math.sqrt(2 * SHAPE.layers)
    for name, parameter in canonical_parameters(model, model.prefixes).items():
        value = parameter.detach()
        if ".norm.weight" in name:
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            std = depth_scaled if name.endswith(("o_proj.weight", "mlp.proj.weight")) else 0.02
            drawn = value[: SHAPE.vocab_size] if name == "embed.tokens.weight" else value
            assert abs(drawn.mean()) < 5 * std / math.sqrt(drawn.numel()), name
            assert abs(drawn.std() - std) < 5 * std / math.sqrt(2 * drawn.numel()), name
            assert (value[len(drawn) :] == 0).all(), name


def test_initial_values_depend_on_seed_and_name_alone(model):
    deeper = build(ModelPlan(SHAPE.model_copy(update={"activation": "gelu", "heads": 4})), seed=5)
    theirs = canonical_parameters(deeper, deeper.prefixes)
    for name, parameter in canonical_parameters(model, model.prefixes).items():
        assert torch.equal(parameter, theirs[name]), name
    other = build(ModelPlan(SHAPE), seed=6)
    name = "layers.00.mlp.fc.weight"
    assert not torch.equal(theirs[name], canonical_parameters(other, other.prefixes)[name])
    first, second = (torch.rand(4, generator=generator_for(5, name)) for name in ("a", "b"))
    assert not torch.equal(first, second)


def softplus(x):
    return x.double().exp().log1p()


LEVELS = {
    Uniform(0.5): lambda x: x.double() + 0.5,
    LogUniform(0, 16): lambda x: x.double().exp() / 16,
    LogUniform(1, 16): lambda x: (x.double().exp() - 1) / 15,
    TimeStep(0.001, 0.1): lambda x: (softplus(x) / 0.001).log() / math.log(100),
}
"""The cumulative distribution function of each start, from its definition."""


@pytest.mark.parametrize(("start", "level"), LEVELS.items(), ids=map(str, LEVELS))
def test_starts_of_decays_have_their_distributions(start, level):
    """Kolmogorov-Smirnov at a level of one in 10^4; one seed and name, one value."""
    values = start.draw((20_000,), generator_for(5, "layers.00.attention.A_log"))
    assert torch.equal(values, start.draw((20_000,), generator_for(5, "layers.00.attention.A_log")))
    levels = level(values).sort().values
    assert levels.min() >= -1e-5 and levels.max() <= 1 + 1e-5
    steps = torch.arange(20_000, dtype=torch.float64) / 20_000
    assert (levels - steps).abs().max() < 2.23 / math.sqrt(20_000)


def test_a_log_never_starts_at_minus_infinity(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.zeros(shape))
    assert torch.equal(LogUniform(0, 16).draw((3,), None), torch.full((3,), 16.0).log())


class Undeclared(Softmax):
    """A mixer whose author forgot to say how its gate starts."""

    def __init__(self, shape, options, layer, entering=()):
        super().__init__(shape, options, layer, entering)
        self.gate = nn.Parameter(torch.empty(1))


def test_a_component_that_declares_no_initial_value_is_refused():
    with pytest.raises(KeyError, match="no initial value is declared for: layers.00.attention.gate, layers.01"):
        build(ModelPlan(SHAPE, attention=f"{__name__}:Undeclared"), seed=0)


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(KeyError, match="no initial value is declared for: b"):
        fill({"a": nn.Parameter(torch.empty(2)), "b": nn.Parameter(torch.empty(2))}, {"a": Rule(Constant(0), True)}, 0)


def test_groups_partition_the_parameters_and_keep_their_rules(model):
    parameters = canonical_parameters(model, model.prefixes)
    rules = canonical_rules(model, model.prefixes, ModelPlan(SHAPE))
    rules["layers.00.mlp.fc.bias"] = Rule(Constant(0.0), decay=False, lr_multiplier=10.0)
    groups = parameter_groups(parameters, rules, OptimizerOptions(weight_decay=0.3))
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, parameters.values()))
    by_id = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in parameters.items():
        group = by_id[id(parameter)]
        assert group["weight_decay"] == (0.3 if parameter.ndim == 2 else 0.0), name
        assert group["lr_multiplier"] == (10.0 if name == "layers.00.mlp.fc.bias" else 1.0), name
    set_learning_rate(groups, 2e-3)
    assert by_id[id(parameters["layers.00.mlp.fc.bias"])]["lr"] == pytest.approx(2e-2)
    assert by_id[id(parameters["embed.tokens.weight"])]["lr"] == pytest.approx(2e-3)


def test_a_parameter_in_two_groups_is_refused():
    shared = nn.Parameter(torch.zeros(2))
    rules = {"a": Rule(Normal(1), True), "b": Rule(Normal(1), False)}
    with pytest.raises(AssertionError):
        parameter_groups({"a": shared, "b": shared}, rules, OptimizerOptions())
