"""The table of variants: what it says against the specification, the model that is built, and what training refuses."""

import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from fnmatch import fnmatchcase
from io import StringIO

import pytest
import torch
from torch import nn

from megaresid import variants
from megaresid.attention.mixer import MIXERS
from megaresid.errors import UserError
from megaresid.model.describe import describe, describe_all, documentation, rules_beside_vanilla
from megaresid.model.gpt import GPT, canonical_rules
from megaresid.model.init import Constant, Rule
from megaresid.model.pipeline import pipeline_module
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS, ModelShape
from megaresid.residual.stream import RESIDUALS, ResidualVariant, Site
from megaresid.spec import Options

NAMES = sorted(RESIDUALS.classes())
SHAPE = ModelShape(layers=4, heads=2, width=64, context=16, vocab_size=100)


def printed(capsys, *arguments: str) -> str:
    capsys.readouterr()
    variants.main(list(arguments))
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def whole() -> str:
    """All that is printed without a name."""
    with redirect_stdout(StringIO()) as said:
        variants.main([])
    return said.getvalue()


def rules_of(spec: str):
    with torch.device("meta"):
        model = GPT(ModelPlan(SHAPE, residual=spec))
    return canonical_rules(model, model.prefixes, model.plan)


def test_the_table_has_two_plain_lines_of_at_most_120_columns_for_every_variant(whole):
    table, legend = whole.split("\n\n", 1)
    assert "\x1b" not in whole and "gpt2-medium" in legend
    assert max(map(len, whole.splitlines())) <= variants.WIDTH
    names = [line.split()[0] for line in table.splitlines()[1:] if not line.startswith(" ")]
    assert sorted(names) == NAMES
    below = [line for line in table.splitlines() if line.startswith("    ")]
    assert len(below) >= len(names)


def test_a_row_says_what_the_specification_says(whole):
    """Section 1: 48 x 1024 parameters. One product for each channel and site; the sublayer's output is kept, and its
    share is of the 604 + 103 + 50 MFLOP of vanilla's forward."""
    numbers, text = (line.split() for line in re.search(r"(layer_scale .*)\n( .*)\n", whole).groups())
    kept = 24 * (2 * (2 * 1024 + 2) + 4 * 1024 + 16 + 8 * 1024) + 2 * 1024 + 2  # numbers per token of vanilla's model
    assert numbers == [
        "layer_scale",
        "+49,152",
        f"{100 * 49_152 / 757_286_912:+.2g}%",
        f"{100 * 49_152 / kept:+.0f}%",
        f"{4 * 49_152:+,}",
        "no",
        "x[1024];",
        "1",
    ]
    assert " ".join(text) == "(start=none); Touvron et al. 2021, arXiv 2103.17239; exact; not with bf16.enabled"


def test_vanilla_adds_nothing(whole):
    vanilla = describe("vanilla", PRESETS["gpt2-medium"])
    added = vanilla.added_parameters, vanilla.added_flops, vanilla.added_bytes
    assert added == (0, 0, 0) and vanilla.incompatible == () and vanilla.equals_vanilla == "exactly"
    assert re.search(r"^vanilla +0 +0 +0 +0 +exactly +x\[1024\]; 1$", whole, flags=re.MULTILINE)


def test_json_holds_the_same_for_programs(capsys):
    tree = json.loads(printed(capsys, "--json", "--model", "tiny"))
    assert tree["schema"] == 2 and tree["model"] == "tiny" and tree["shape"]["width"] == 128
    assert sorted(one["name"] for one in tree["variants"]) == NAMES
    of = {one["name"]: one for one in tree["variants"]}
    assert of["vanilla"]["state"] == [{"name": "x", "shape": [128]}] and of["vanilla"]["tensors_at_end"] == 1
    assert of["layer_scale"]["added_parameters"] == 2 * 4 * 128 and of["layer_scale"]["added_bytes"] == 4 * 2 * 4 * 128
    (option,) = of["layer_scale"]["options"]
    assert (option["name"], option["value"], option["default"]) == ("start", None, None)
    assert of["layer_scale"]["incompatible"] == ["bf16.enabled"]


def test_options_of_a_name_change_what_it_costs(capsys):
    (wide,), (narrow,) = (
        json.loads(printed(capsys, f"hyper_connections(streams={streams})", "--json"))["variants"] for streams in (4, 2)
    )
    assert [wide["added_parameters"], narrow["added_parameters"]] == [394_464, 295_392]  # section 1
    assert wide["state"] == [{"name": "streams", "shape": [4, 1024]}]
    values = {option["name"]: (option["value"], option["default"]) for option in narrow["options"]}
    assert values["streams"] == (2, 4)


@pytest.mark.parametrize("model", PRESETS)
def test_every_variant_fits_every_preset(model):
    assert sorted(one.name for one in describe_all(PRESETS[model])) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_documented(name):
    """Its paper or that it is ours, an equation or its words, and each option with a type and a meaning."""
    found = describe(name, SHAPE)
    assert found.paper and documentation(name, SHAPE)
    assert re.fullmatch(r"exact|own|reconstructed: .+", found.fidelity, flags=re.DOTALL)
    assert found.equals_vanilla in ("exactly", "up to epsilon", "no")
    assert [option.name for option in found.options if not (option.type and option.description)] == []


@pytest.mark.parametrize("name", NAMES)
def test_one_in_full_shows_its_options_and_rules(name, capsys):
    said = printed(capsys, name, "--model", "tiny")
    assert documentation(name, SHAPE).splitlines()[0].split()[0] in said
    for option in describe(name, SHAPE).options:
        assert re.search(rf"^ *{option.name} .*{re.escape(option.description.split()[0])}", said, flags=re.MULTILINE)
    for rule in rules_beside_vanilla(ModelPlan(PRESETS["tiny"], residual=name)):
        line = re.search(rf"^ *{re.escape(rule.names)} .*$", said, flags=re.MULTILINE)[0]
        assert line.split()[-4:] == [
            "yes" if rule.decay else "no",
            f"x{rule.lr_multiplier:g}",
            f"x{rule.epsilon_multiplier:g}",
            "yes" if rule.fp32 else "no",
        ]


@pytest.mark.parametrize("name", NAMES)
def test_the_rules_beside_vanilla_are_those_of_the_model(name):
    """Each parameter that vanilla has not, or that has another rule, is matched by an entry with its rule, and no entry
    matches another."""
    vanilla, rules = rules_of("vanilla"), rules_of(name)
    entries = rules_beside_vanilla(ModelPlan(SHAPE, residual=name))
    for parameter, rule in rules.items():
        treatment = rule.decay, rule.lr_multiplier, rule.epsilon_multiplier, rule.fp32
        matching = [entry for entry in entries if fnmatchcase(parameter, entry.names)]
        told = {(entry.decay, entry.lr_multiplier, entry.epsilon_multiplier, entry.fp32) for entry in matching}
        if rule == vanilla.get(parameter):
            assert told == set(), parameter
        else:
            assert treatment in told, parameter


@pytest.mark.parametrize("name", NAMES)
def test_what_it_cannot_be_trained_with_is_what_is_refused(name):
    excluded = describe(name, SHAPE).incompatible
    with torch.device("meta"):
        buffers = GPT(ModelPlan(SHAPE, residual=name)).buffers()
    kept = any(rule.fp32 for rule in rules_of(name).values()) or any(b.is_floating_point() for b in buffers)
    assert ("bf16.enabled" in excluded) == kept
    if "pipeline parallelism" in excluded:
        with pytest.raises(UserError, match="pipeline"):
            pipeline_module(ModelPlan(SHAPE, residual=name), stages=1, seed=0)
    refused = {entry.removeprefix("attention ") for entry in excluded if entry.startswith("attention ")}
    one_input = {attention for attention, mixer in MIXERS.classes().items() if not mixer.ways}
    assert refused == (one_input if RESIDUALS.classes()[name].ways else set())
    for attention in (mixer for mixer in refused if not MIXERS.classes()[mixer].needs):  # what this machine can build
        with pytest.raises(UserError, match="separate inputs"):
            ModelPlan(SHAPE, attention, name)


class OwnOptions(Options):
    factor: float = 0.5
    """What the update is multiplied by."""


class Own(ResidualVariant):
    """x <- x + factor f(LN(x)), were it more than a declaration."""

    citation = "a user"
    Options = OwnOptions


def test_a_variant_of_the_users_own(capsys):
    """It is not registered, and what says nothing of its fidelity is nobody's exact publication."""
    spec = f"{__name__}:Own(factor=0.25)"
    assert printed(capsys, spec).startswith(f"{__name__}:Own\n")
    found = describe(spec, SHAPE)
    assert [(option.name, option.value, option.default) for option in found.options] == [("factor", 0.25, 0.5)]
    assert (found.paper, found.fidelity) == ("a user", "own")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "gpt2-medum"], "--model gpt2-medum: did you mean 'gpt2-medium'"),
        (["layer_skale"], "unknown residual or attention 'layer_skale': did you mean 'layer_scale'"),
        (["layer_scale(stat=1)"], "no option 'stat': did you mean 'start'"),
        (["layer_scale("], "expected a value at character 13"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        variants.main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said


def test_help_waits_for_no_torch_and_the_table_for_no_deepspeed():
    def loaded(*arguments: str) -> set[str]:
        code = (
            "import sys; from megaresid.variants import main\n"
            f"try: main({list(arguments)!r})\nexcept SystemExit: pass\n"
            "print(*(name.split('.')[0] for name in sys.modules), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return set(done.stderr.split())

    assert not loaded("--help") & {"torch", "deepspeed"}
    table = loaded("--model", "tiny")
    assert "torch" in table and "deepspeed" not in table


class Undeclared(ResidualVariant):
    """A user's variant that says nothing of what it costs."""

    citation = "here"

    class site_class(Site):
        def __init__(self, shape, options, place):
            super().__init__(shape, options, place)
            self.scale = nn.Parameter(torch.empty(shape.width))

        def parameter_rules(self):
            return {"scale": Rule(Constant(1.0), decay=False)}

        def write(self, state, context, normed, update):
            return (state[0] + self.scale * update,)


def test_what_a_class_does_not_declare_is_not_told_as_nothing(capsys):
    spec = f"{__name__}:Undeclared"
    said = printed(capsys, spec, "--model", "tiny")
    assert re.search(r"^parameters +\+1,024 over", said, flags=re.MULTILINE)  # 2 x 4 x 128
    assert re.search(r"^FLOPs +not declared *\nmemory +not declared *$", said, flags=re.MULTILINE)
    (found,) = json.loads(printed(capsys, spec, "--json", "--model", "tiny"))["variants"]
    assert found["added_parameters"] == 1024
    costs = ("added_flops", "added_flops_percent", "added_bytes", "added_bytes_percent")
    assert [found[key] for key in costs] == 4 * [None]


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_are_those_of_the_model(name):
    def count(spec: str) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in GPT(ModelPlan(SHAPE, residual=spec)).parameters())

    assert describe(name, SHAPE).added_parameters == count(name) - count("vanilla")


def test_what_rounding_to_bf16_would_spoil_includes_buffers():
    assert "bf16.enabled" in describe("pro_res", SHAPE).incompatible


@pytest.mark.parametrize("spec", ["vanilla + layer_scale", "3*vanilla"])
def test_a_pattern_is_no_variant(spec):
    with pytest.raises(UserError, match="is a pattern over the depth: name one variant, such as vanilla$"):
        describe(spec, SHAPE)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_cuts_nothing(width, capsys, monkeypatch):
    monkeypatch.setattr(variants, "WIDTH", width)
    said = printed(capsys, "mhc")
    assert max(map(len, said.splitlines())) <= width and said.count("…") == 4  # of the lists of values alone
    assert said.count("yes") == 8  # two that decay, six in fp32


def test_starts_and_choices_are_short():
    plan = ModelPlan(PRESETS["tiny"], residual="mhc(streams=2)")
    starts = {rule.names: rule.start for rule in rules_beside_vanilla(plan)}
    assert starts["layers.*.mlp.site.phi"] == "0"
    assert starts["layers.*.mlp.site.b"].endswith(", … (8 values)")
    types = {option.name: option.type for option in describe("mhc", SHAPE).options}
    assert (types["streams"], types["close"]) == ("int >= 2, <= 8", "mean or sum")
