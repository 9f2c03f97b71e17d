"""The table of mixers: what it says against hand counts, the model that is built, and a text that is generated."""

import json
import re
import sys
import types
from contextlib import redirect_stdout
from fnmatch import fnmatchcase
from io import StringIO

import pytest
import torch
from torch._subclasses import FakeTensorMode

from megaresid import variants
from megaresid.attention.mixer import MIXERS, Mixer
from megaresid.errors import UserError
from megaresid.model.count import parameters_by_component
from megaresid.model.describe_mixers import (
    describe_mixer,
    mixer_documentation,
    mixer_rules,
    names_a_mixer,
)
from megaresid.model.flops import forward_flops_per_token
from megaresid.model.gpt import GPT, build, canonical_rules
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS, ModelShape
from megaresid.residual.stream import RESIDUALS
from megaresid.spec import Options, write

SHAPE = ModelShape(layers=3, heads=2, width=16, context=12, vocab_size=40)
LISTED = [*MIXERS.classes(), *MIXERS.presets()]


def is_whole(name: str) -> bool:
    """Whether the name alone is a mixer that can be built."""
    cls = MIXERS.classes().get(name)
    return cls is None or not any(field.is_required() for field in cls.Options.model_fields.values())


EXAMPLES = [*filter(is_whole, LISTED)] + [
    "blend(softmax(positions=rope), causal_conv, gate=per_head)",
    "split(kda, softmax(window=4))",
    "skip(mamba2, output_gate=per_token_head)",
    "value_residual(learned=true, kv_heads=1)",
]


def printed(capsys, *arguments: str) -> str:
    capsys.readouterr()
    variants.main(list(arguments))
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def table() -> str:
    """All that is printed for gpt2-medium."""
    with redirect_stdout(StringIO()) as said:
        variants.main(["--model", "gpt2-medium"])
    return said.getvalue()


def plan_of(spec: str, shape: ModelShape = SHAPE) -> ModelPlan:
    return ModelPlan(shape, spec)


def rules_of(spec: str):
    with torch.device("meta"):
        model = GPT(plan_of(spec))
    return canonical_rules(model, model.prefixes, model.plan)


def test_no_name_is_a_mixers_and_a_residual_variants():
    assert not set(LISTED) & RESIDUALS.classes().keys()
    assert [names_a_mixer(name) for name in ("gla(expand_k=1)", "gla_conv", "rezero")] == [True, True, False]


def test_the_table_lists_every_mixer_and_preset_within_120_columns(table):
    _, _, mixers, legend = table.split("\n\n")
    lines = mixers.splitlines()
    assert lines[0].split() == ["mixer", "parameters", "FLOPs", "carried", "a", "token", "positions"]
    names = [line.split()[0] for line in lines[1:] if not line.startswith(" ")]
    assert names[0] == "softmax" and names[-len(MIXERS.presets()) :] == [*MIXERS.presets()]
    assert sorted(names) == sorted(LISTED)
    assert max(map(len, (*lines, *legend.splitlines()))) <= variants.WIDTH and "gpt2-medium" in legend


def test_rows_are_what_is_counted_by_hand(table):
    """24 layers of 16 heads and 757 MFLOP. Softmax attention keeps keys and values of 1024 each, and a count of 8
    bytes; GLA a state of 32 x 64 a head; the convolution three tokens of 1024 channels. GLA has 16 x 1024, 512 x 16,
    512 of bias and 64 of the norm, and none of the 4 biases; the convolution 4 x 1024 and no projection."""
    keys = f"{24 * 2 * 1024 * 4:,}"
    gla, conv = 24 * (16 * 1024 + 512 * 16 + 512 + 64 - 4 * 1024), 24 * (4 * 1024 - 4 * 1024 * 1025)
    less = 100 * 24 * (2 * 4 * 1024 - 2 * 4 * 1024**2 - 4 * 1024 * 512.5) / 757_286_912
    for name, *cells in (
        ("softmax", "0", "0", "192", keys, "learned"),
        ("value_residual", "0", "0", "192", keys, "learned"),
        ("gla", f"+{gla:,}", "-6%", f"{24 * 16 * 32 * 64 * 4:,}", "0", "none"),
        ("causal_conv", f"{conv:,}", f"{less:+.0f}%", f"{24 * 3 * 1024 * 4:,}", "0", "none"),
    ):
        (row,) = re.findall(rf"^{name} .*$", table, flags=re.MULTILINE)
        assert row.split()[1:] == cells


@pytest.mark.parametrize("spec", EXAMPLES)
def test_parameters_flops_and_positions_are_those_of_the_model(spec):
    found, plan, softmax = describe_mixer(spec, SHAPE), plan_of(spec), plan_of("softmax")
    theirs, ours = (parameters_by_component(each)["attention"] for each in (plan, softmax))
    assert found.added_parameters == theirs - ours
    flops, vanilla = forward_flops_per_token(plan), forward_flops_per_token(softmax)
    assert found.added_flops == flops["attention"] - vanilla["attention"]
    assert found.added_flops_percent == pytest.approx(100 * (sum(flops.values()) / sum(vanilla.values()) - 1))
    assert found.positions == plan.has_positions


@pytest.mark.parametrize("spec", EXAMPLES)
def test_what_a_text_carries_is_what_its_cache_holds(spec):
    found = describe_mixer(spec, SHAPE)
    model = build(plan_of(spec), seed=0)
    for length in (SHAPE.context, SHAPE.context - 5):
        cache = model.init_cache(length)
        for token in torch.arange(length)[:, None]:
            model(token[None], cache=cache)
        held = sum(layer.bytes() for layer in cache.layers)
        assert held == found.carried_bytes + length * found.carried_bytes_a_token, length


@pytest.mark.parametrize("spec", EXAMPLES)
def test_what_it_cannot_be_trained_with_is_what_is_refused(spec):
    excluded = describe_mixer(spec, SHAPE).incompatible
    with torch.device("meta"):
        buffers = GPT(plan_of(spec)).buffers()
    kept = any(rule.fp32 for rule in rules_of(spec).values()) or any(b.is_floating_point() for b in buffers)
    assert ("bf16.enabled" in excluded) == kept
    assert set(excluded) <= {"bf16.enabled"}  # what ours exclude; for the rest, see test_users_mixer
    ModelPlan(SHAPE.model_copy(update={"end_of_text": 0}), spec, "mudd_former", documents=True)


@pytest.mark.parametrize("spec", EXAMPLES)
def test_the_rules_are_those_of_the_model(spec):
    """Each parameter that softmax has not, or that has another rule, is matched by an entry with its rule, and no entry
    matches another."""
    softmax, entries = rules_of("softmax"), mixer_rules(spec, SHAPE)
    for parameter, rule in rules_of(spec).items():
        treatment = rule.decay, rule.lr_multiplier, rule.epsilon_multiplier, rule.fp32
        matching = [entry for entry in entries if fnmatchcase(parameter, entry.names)]
        told = {(entry.decay, entry.lr_multiplier, entry.epsilon_multiplier, entry.fp32) for entry in matching}
        if rule == softmax.get(parameter):
            assert told == set(), parameter
        else:
            assert treatment in told, parameter


@pytest.mark.parametrize("name", LISTED)
def test_every_mixer_is_documented(name):
    """Its paper or that it is ours, an equation or its words, and each option with a type and a meaning."""
    found = describe_mixer(name, SHAPE)
    assert found.paper not in ("", "not given") and mixer_documentation(name)
    assert re.fullmatch(r"(exact|own)(: .+)?|reconstructed: .+", found.fidelity, flags=re.DOTALL)
    assert [option.name for option in found.options if not (option.type and option.description)] == []
    assert bool(found.words and found.stands_for and not found.options) == (name in MIXERS.presets())


@pytest.mark.parametrize("name", ["gla", "delta_skip", "blend", "blend(softmax, gla)", "value_residual(first=0.25)"])
def test_one_in_full_shows_its_options_and_rules(name, capsys):
    said, found = printed(capsys, name, "--model", "tiny"), describe_mixer(name, PRESETS["tiny"])
    assert said.startswith(f"{found.name}\n")
    shown = " ".join(said.split())
    assert " ".join(mixer_documentation(name).split()) in shown and found.stands_for in shown
    for option in found.options:
        written = "-" if option.required and option.value is None else write(option.value)
        assert re.search(rf"^ *{option.name} .* {re.escape(written)} ", said, flags=re.MULTILINE), option.name
    for rule in mixer_rules(name, PRESETS["tiny"]):
        line = re.search(rf"^ *{re.escape(rule.names)} .*$", said, flags=re.MULTILINE)[0]
        assert line.split()[-1] == ("yes" if rule.fp32 else "no")


def test_json_has_the_same_for_programs(capsys):
    tree = json.loads(printed(capsys, "--json", "--model", "tiny"))
    of = {one["name"]: one for one in tree["mixers"]}
    assert tree["schema"] == 2 and sorted(of) == sorted(LISTED) and len(tree["variants"]) == len(RESIDUALS.classes())
    assert of["gla"]["carried_bytes"] == 4 * 4 * 16 * 32 * 4
    assert of["softmax"]["carried_bytes_a_token"] == 4 * 2 * 128 * 4
    assert of["blend"]["added_flops"] is None and [o["required"] for o in of["blend"]["options"]] == [True, True, False]
    one = json.loads(printed(capsys, "blend(gla, causal_conv(kernel=2))", "--json", "--model", "tiny"))
    (mixer,) = one["mixers"]
    assert one["variants"] == [] and [option["value"] for option in mixer["options"]] == [
        "gla",
        "causal_conv(kernel=2)",
        "per_token_channel",
    ]


@pytest.mark.parametrize("spec", EXAMPLES)
def test_every_mixer_fits_every_shape_that_has_a_name(spec):
    """25 heads of width 1600 too, whose half is no whole number."""
    for shape in PRESETS.values():
        with FakeTensorMode():
            y, _ = ModelPlan(shape, spec).mixer_of(0)(torch.zeros(1, 1, shape.width), ())
        assert y.shape == (1, 1, shape.width)


class Unbuildable(Mixer):
    """What this machine has not."""

    citation = "a user"
    needs = "a GPU and a library"

    class Options(Options):
        size: int = 1
        """Of something."""

    def __init__(self, *arguments):
        raise RuntimeError("built")

    @classmethod
    def check(cls, shape, options):
        raise UserError("checked")

    @classmethod
    def needs_positions(cls, options):
        return options.size > 1


def test_what_needs_another_machine_is_listed_without_being_built(monkeypatch, capsys):
    module = types.ModuleType("users")
    module.Unbuildable = Unbuildable
    monkeypatch.setitem(sys.modules, "users", module)
    found = describe_mixer("users:Unbuildable(size=2)", SHAPE)
    assert (found.needs, found.positions) == (Unbuildable.needs, True)
    assert (found.added_parameters, found.added_flops, found.carried_bytes) == (None, None, None)
    assert [option.value for option in found.options] == [2]
    assert describe_mixer("blend(gla, users:Unbuildable)", SHAPE).needs == Unbuildable.needs
    said = printed(capsys, "users:Unbuildable")
    assert re.search(r"^needs +a GPU and a library *$", said, flags=re.MULTILINE)
    assert re.search(r"^parameters +- *\nFLOPs +- *$", said, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "name, message",
    [
        ("glaa", "unknown residual or attention 'glaa': did you mean 'gla'?"),
        ("gla(expand=1)", "attention 'gla' has no option 'expand': did you mean 'expand_v'?"),
        ("gla + softmax", "'gla + softmax' is a pattern over the depth: name one variant, such as gla"),
        ("gla | softmax | gla", "is a pattern over the depth: name one variant, such as softmax"),
        ("gla_conv(kernel=2)", "attention preset 'gla_conv' takes no options"),
        ("blend(gla)", "attention 'blend': b is missing"),
        ("nowhere:Mixer", "cannot import attention 'nowhere:Mixer'"),
    ],
)
def test_mistakes_are_told_in_one_line(name, message, capsys):
    with pytest.raises(SystemExit) as caught:
        variants.main([name])
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and message in said and "\n" not in said


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_cuts_nothing(width, capsys, monkeypatch):
    monkeypatch.setattr(variants, "WIDTH", width)
    said = printed(capsys, "kda")
    assert max(map(len, said.splitlines())) <= width and "…" not in said
