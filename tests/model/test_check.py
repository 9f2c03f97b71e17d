"""What a user's own variant gets wrong is told before anything is trained, in one line that names the mend."""

import sys
import types

import pytest
import torch
from torch import nn

from megaresid.errors import UserError
from megaresid.model.check import check_states, complete_rules
from megaresid.model.gpt import GPT
from megaresid.model.init import Constant, Rule
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape
from megaresid.residual.stream import RESIDUALS, Entry, ResidualVariant, Site
from megaresid.spec import Options

SHAPE = ModelShape(layers=3, heads=2, width=16, context=8, vocab_size=50)


class ScaledSite(Site):
    def __init__(self, shape, options, place):
        super().__init__(shape, options, place)
        self.gain = nn.Parameter(torch.empty(1))


class WithoutRule(ResidualVariant):
    site_class = ScaledSite


class MisnamedSite(ScaledSite):
    def parameter_rules(self):
        return {"gian": Rule(Constant(1.0), decay=False)}


class Misnamed(ResidualVariant):
    site_class = MisnamedSite


class KeepsInput(Site):
    def write(self, state, context, normed, update):
        return (state[0] + update, state[0])


class WrongLength(ResidualVariant):
    site_class = KeepsInput


class WrongShape(ResidualVariant):
    def state_spec(self, index):
        return (Entry("x", (4, self.shape.width)),)


class Required(ResidualVariant):
    class Options(Options):
        start: float


class ForeignOptions(ResidualVariant):
    Options = dict


@pytest.fixture
def users_own(monkeypatch):
    """The classes above as ``users:Name``."""
    module = types.ModuleType("users")
    module.__dict__.update({name: value for name, value in globals().items() if isinstance(value, type)})
    monkeypatch.setitem(sys.modules, "users", module)


def model_of(spec: str) -> GPT:
    with torch.device("meta"):
        return GPT(ModelPlan(SHAPE, residual=spec))


@pytest.mark.parametrize(
    "name, message",
    [
        ("WithoutRule", "no initial value is declared for layers.00.attention.site.gain: let parameter_rules"),
        ("Misnamed", r"MisnamedSite declares rules of parameters it has not: \['gian'\]"),
    ],
)
def test_rules_are_complete_and_of_parameters_that_are_there(name, message, users_own):
    with pytest.raises(UserError, match=message):
        complete_rules(model_of(f"users:{name}"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("WrongLength", r"layer 0 of 3 gives tensors of shapes \(\[16\], \[16\]\).*promises \(x\[16\]\)"),
        ("WrongShape", r"the opening of 3 gives tensors of shapes \(\[16\]\).*promises \(x\[4, 16\]\)"),
    ],
)
def test_states_are_the_promised_ones(name, message, users_own):
    with pytest.raises(UserError, match=message):
        check_states(ModelPlan(SHAPE, residual=f"users:{name}"))


def test_what_is_built_in_keeps_its_promises():
    for name in RESIDUALS.classes():
        complete_rules(model_of(name))
        check_states(ModelPlan(SHAPE, residual=name))


@pytest.mark.parametrize(
    "spec, message",
    [
        ("os:path", "'os:path' is not a subclass of megaresid.residual.stream:ResidualVariant"),
        ("users:KeepsInput", "is not a subclass of megaresid.residual.stream:ResidualVariant"),
        ("users:Required", r"start is missing \(type float\)"),
        ("users:Required(start=fast)", "start=fast is not valid .*type float, no default"),
        ("users:ForeignOptions", "its Options are not a subclass of megaresid.spec:Options"),
        ("layer_scale(start=1e999)", "start=Infinity is not valid"),
        ("hyper_connections(streams=true)", "streams=true is not valid"),
        ("laurel_lr(rank=17)", "rank=17 is above the width 16"),
        ("laurel_lr(rank=" + "9" * 5000 + ")", "a number of more than 100 characters"),
    ],
)
def test_bad_components_are_refused_in_one_line(spec, message, users_own):
    with pytest.raises(UserError, match=message) as caught:
        ModelPlan(SHAPE, residual=spec)
    assert "\n" not in str(caught.value)


def test_a_users_file_that_does_not_run_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text, message in (
        ("broken_syntax", "class :", "SyntaxError"),
        ("broken_run", "raise RuntimeError('out of order')", "RuntimeError: out of order"),
        ("no_such_name", "", "no_such_name.*has no attribute 'X'"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(UserError, match=f"cannot import residual '{name}:X': .*{message}"):
            ModelPlan(SHAPE, residual=f"{name}:X")
