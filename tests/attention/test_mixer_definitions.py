"""Every mixer equals its definition, away from initialisation, in fp64: outputs and the gradient of every input and
parameter."""

import pytest
import torch
from mixer_models import SEGMENT, Mixers, inputs, shape_of
from mixer_table import FAMILIES, ROWS

from megaresid.attention.mixer import MIXERS
from megaresid.model.gpt import GPT, canonical_parameters, canonical_rules
from megaresid.model.plan import ModelPlan
from megaresid.spec import parse_pattern


def inputs_of(row, ways: bool):
    """One input, or three different ones."""
    return tuple(inputs(row, seed=seed).requires_grad_() for seed in range(3 if ways else 1))


@pytest.mark.parametrize(
    ("documents", "ways"),
    [
        pytest.param(False, False, id="one input"),
        pytest.param(True, True, id="documents, three inputs"),
        pytest.param(False, True, id="three inputs", marks=pytest.mark.full),
        pytest.param(True, False, id="documents", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_outputs_and_gradients_equal_the_definition(row, documents, ways):
    """The gradients are those of a random weighting of the outputs."""
    mixers = Mixers(row, documents)
    segment = SEGMENT if documents else None
    given = inputs_of(row, ways)
    x = given if ways else given[0]
    found, expected = mixers(x, segment), mixers.by_definition(x, segment)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
    names = ("x_q", "x_k", "x_v") if ways else ("x",)
    weights, named = inputs(row, seed=9), mixers.parameters() | dict(zip(names, given))
    gradients, wanted = (
        torch.autograd.grad((weights * y).sum(), list(named.values()), allow_unused=True) for y in (found, expected)
    )
    scale = max(gradient.norm() for gradient in wanted if gradient is not None)
    for (name, tensor), gradient, want in zip(named.items(), gradients, wanted):
        assert gradient is not None or name in row.undriven, f"{name} is dead"
        gradient, want = (torch.zeros_like(tensor) if each is None else each for each in (gradient, want))
        assert (gradient - want).norm() < 1e-10 * max(want.norm(), 1e-4 * scale), name
        assert (want.norm() < 1e-12 * scale) == name.endswith(row.undriven or ("-",)), f"{name}: row.undriven"


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_parameter_has_a_rule(row):
    """Biases, the weights of norms and other vectors do not decay."""
    plan = ModelPlan(shape_of(row), row.spec)
    model = GPT(plan)
    parameters = canonical_parameters(model, model.prefixes)
    rules = canonical_rules(model, model.prefixes, plan)
    assert rules.keys() == parameters.keys()
    for name, parameter in parameters.items():
        if ".attention." in name and parameter.dim() < 2:
            assert not rules[name].decay, name
        if name.endswith(("A_log", "dt_bias")):
            assert rules[name].fp32, name


def test_every_family_and_every_mixer_that_runs_on_a_cpu_has_a_row():
    families = {row.define.__module__ for row in ROWS}
    named = {component.name for row in ROWS for component in parse_pattern(row.spec).components()}
    on_a_cpu = {name for name, cls in MIXERS.classes().items() if not cls.needs}
    assert on_a_cpu <= named <= MIXERS.classes().keys() | MIXERS.presets().keys()
    assert {f"define_{family}" for family in FAMILIES} <= families
