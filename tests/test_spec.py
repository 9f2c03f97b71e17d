"""The language of layer specs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaresid.attention.mixer import MIXERS, component_text
from megaresid.errors import UserError
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape
from megaresid.spec import (
    DEEPEST,
    Component,
    Options,
    Pattern,
    Registry,
    fingerprint,
    parse_pattern,
    type_name,
)

SHAPE = ModelShape(layers=5, heads=2, width=16, context=8, vocab_size=50)


def only(text: str) -> Component:
    ((_, component),) = parse_pattern(text).terms
    return component


def test_patterns_repeat_over_the_depth():
    pattern = parse_pattern("3*gated_delta_net(expand_v=1.5) + softmax")
    names = [component.name for component in pattern.over(10)]
    assert names == 2 * (3 * ["gated_delta_net"] + ["softmax"]) + 2 * ["gated_delta_net"]


@pytest.mark.parametrize(
    "text, layers, names",
    [
        ("a | b + 2*c | d", 7, "a b c c b c d"),
        ("a | b + 2*c | d", 3, "a b d"),
        ("2*a | b |", 4, "a a b b"),
        ("| b | c + d", 4, "b b c d"),
        ("a | b | c", 2, "a c"),  # nothing between the ends
        ("| a |", 2, "a a"),
    ],
)
def test_the_ends_of_a_pattern_stand_once(text, layers, names):
    assert [str(component) for component in parse_pattern(text).over(layers)] == names.split()


@pytest.mark.parametrize("text", ["2*a | b | c", f"{10**90}*a | b |", f"| b | {10**90}*c"])
def test_more_fixed_layers_than_the_model_has(text):
    with pytest.raises(UserError, match="fixes more layers at its ends than the 2 of the model: fix fewer"):
        parse_pattern(text).over(2)


def test_all_components_of_a_pattern_are_named_once():
    assert [str(component) for component in parse_pattern("a | 3*b(x=1) + c | d + a").components()] == [
        "a",
        "b(x=1)",
        "c",
        "d",
        "a",
    ]


def test_values_have_their_types():
    component = only("a.b:Mixer( i=-3, f = 1e-3 ,yes=TRUE, no=false, nothing=none, word=swish )")
    assert component.name == "a.b:Mixer"
    expected = {"i": -3, "f": 1e-3, "yes": True, "no": False, "nothing": None, "word": "swish"}
    assert dict(component.options) == expected
    assert [type(v) for _, v in component.options] == [type(v) for v in expected.values()]


def test_values_without_a_name_come_before_options_and_may_be_components():
    component = only("blend( gla(expand_k=0.5, b=c(1)) , softmax, 3, -1.5,true, none, gate=per_head, other=a.b:M(x=1))")
    gla = Component("gla", (("expand_k", 0.5), ("b", Component("c", (), (1,)))))
    assert component.arguments == (gla, "softmax", 3, -1.5, True, None)
    assert component.options == (("gate", "per_head"), ("other", Component("a.b:M", (("x", 1),))))
    assert only("a(b())") == only("a(b)")


words = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda w: w not in ("true", "false", "none"))
values = st.integers() | st.booleans() | st.none() | words | st.floats(allow_nan=False, allow_infinity=False)


def built(values: st.SearchStrategy) -> st.SearchStrategy:
    """Components of these values, with a name and without."""
    return st.builds(
        lambda name, options, arguments: Component(name, tuple(options.items()), tuple(arguments)),
        words,
        st.dictionaries(words, values, max_size=3),
        st.lists(values, max_size=2),
    )


# What a component without options says as a value, a word says.
nested = st.recursive(values, lambda inner: built(inner).filter(lambda c: c.options or c.arguments), max_leaves=6)
ends = st.lists(st.tuples(st.integers(1, 9), built(nested)), max_size=2).map(tuple)
terms = st.lists(st.tuples(st.integers(1, 9), built(nested)), min_size=1, max_size=4).map(tuple)


@given(terms, ends, ends)
def test_what_is_printed_parses_to_the_same(terms, first, last):
    pattern = Pattern(terms, first, last)
    assert parse_pattern(str(pattern)) == pattern


@given(st.text(max_size=40) | st.text("ab13(),=*+| .:-", max_size=40))
def test_any_text_parses_or_is_one_line_of_error(text):
    try:
        parse_pattern(text)
    except UserError as error:
        assert repr(text) in str(error)


@pytest.mark.parametrize(
    "text, what",
    [
        ("", "expected a name at character 1"),
        ("a +", "expected a name at character 4"),
        ("0*a", "expected a count of layers such as 3*name at character 2"),
        ("1.5*a", "expected a count of layers such as 3*name at character 4"),
        ("a(", "expected a value at character 3"),
        ("a(x=1, 2)", "expected option=value at character 7"),
        ("a(x=1, b(c))", "expected option=value at character 7"),
        ("a(x=)", "expected a value at character 5"),
        ("a(x=1 y=2)", "expected ',' or ')' at character 6"),
        ("a(x=1,x=2)", "option 'x' is given twice at character 9"),
        ("a(b(x=1,x=2))", "option 'x' is given twice at character 11"),
        ("a(-b)", "expected a number at character 4"),
        ("a b", "unexpected text at character 2"),
        ("a)", "unexpected text at character 2"),
        ("a | b", "expected '+' or a second '|' (first | repeated | last) at character 6"),
        ("a b | c |", "expected '+' or '|' at character 2"),
        ("a | | b", "expected a name at character 4"),
        ("a | b | c | d", "unexpected text at character 10"),
        (DEEPEST * "a(" + "a(b)", f"more than {DEEPEST} components in each other at character 43"),
        (5000 * "a(", f"more than {DEEPEST} components in each other at character 43"),
    ],
)
def test_malformed_specs_show_the_place(text, what):
    with pytest.raises(UserError) as caught:
        parse_pattern(text)
    assert str(caught.value) == f"layer spec {text!r}: {what}"


def test_the_deepest_that_is_allowed():
    text = (DEEPEST - 1) * "a(" + "a(b)" + (DEEPEST - 1) * ")"
    assert str(parse_pattern(text)) == text and parse_pattern(f"{text} + {text}")


class Streams(Options):
    positional = ("streams",)

    streams: int = 4
    dynamic: bool = True


def registry() -> Registry:
    made = Registry("residual", "megaresid.residual", "megaresid.residual.stream:ResidualVariant")

    @made.register("hyper")
    class Hyper:
        Options = Streams

    made.preset("wide", "hyper(8, dynamic=false)", "eight streams")
    return made


def test_options_are_checked_and_defaults_filled_in():
    cls, options = registry().resolve(only("hyper(streams=2)"))
    assert cls.name == "hyper" and options == Streams(streams=2, dynamic=True)
    assert registry().resolve(only("hyper(2)"))[1] == options


def test_a_preset_stands_for_what_it_writes_out():
    made = registry()
    assert made.resolve(only("wide")) == made.resolve(only("hyper(streams=8, dynamic=false)"))
    with pytest.raises(ValueError, match="two residual presets are named 'wide'"):
        made.preset("wide", "hyper", "")


@pytest.mark.parametrize(
    "text, message",
    [
        ("hiper", "unknown residual 'hiper': did you mean 'hyper'"),
        ("hyper(stream=2)", "residual 'hyper' has no option 'stream': did you mean 'streams'"),
        ("hyper(streams=many)", "streams=many is not valid .*type int, default 4"),
        ("hyper(2, 3)", "residual 'hyper' takes only streams without a name, and 2 are given: write option=value"),
        ("hyper(2, streams=3)", "residual 'hyper': option 'streams' is given twice"),
        ("wide(dynamic=true)", "preset 'wide' takes no options: write out 'hyper\\(8, dynamic=false\\)' and change it"),
        ("wide(2)", "preset 'wide' takes no options"),
        ("wyde", "unknown residual 'wyde': did you mean 'wide'"),
        ("no_such_module:Thing", "cannot import residual 'no_such_module:Thing'"),
    ],
)
def test_mistakes_name_the_value_and_the_mend(text, message):
    with pytest.raises(UserError, match=message):
        registry().resolve(only(text))


def test_the_fingerprint_ignores_the_order_of_keys_only():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) != fingerprint({"a": 1, "b": [2, 1]})


def test_types_are_written_for_a_user():
    fields = MIXERS.classes()["skip"].Options.model_fields
    gates = "per_token_channel or per_token_head or per_head"
    assert type_name(fields["a"].annotation) == "mixer"
    assert type_name(fields["gate"].annotation) == f"scale or {gates}"
    assert type_name(fields["output_gate"].annotation) == f"{gates} or none"
    assert [type_name(kind) for kind in (int, bool, float | None)] == ["int", "bool", "float or none"]


@pytest.mark.parametrize(
    "text, written",
    [
        ("blend(b=gla_conv, a=causal_conv(kernel=4))", "blend(causal_conv, {gla_conv})"),
        ("blend(causal_conv(kernel=2), skip(gla), gate=per_token_channel)", "blend(causal_conv(kernel=2), skip(gla))"),
        ("split(softmax, causal_conv, share=0.7)", "split(softmax, causal_conv, share=0.7)"),
        ("gla(use_output_gate=false)", "gla(use_output_gate=false)"),
    ],
)
def test_a_resolved_mixer_is_written_with_what_is_not_its_default(text, written):
    inside = component_text(*MIXERS.resolve(only("gla_conv")))
    assert inside == "blend(gla, causal_conv)"
    assert component_text(*MIXERS.resolve(only(text))) == written.format(gla_conv=inside)
    assert ModelPlan(SHAPE, written.format(gla_conv="gla_conv")).hash == ModelPlan(SHAPE, text).hash


@pytest.mark.parametrize("name", MIXERS.presets())
def test_a_plan_of_a_preset_is_that_of_what_it_stands_for(name):
    text = MIXERS.presets()[name].text
    plan = ModelPlan(SHAPE, f"softmax | {name} | softmax")
    assert plan.hash == ModelPlan(SHAPE, f"softmax | {text} | softmax").hash != ModelPlan(SHAPE, "softmax").hash
    assert plan.tree()["layers"][1]["attention"]["name"] == only(text).name


@pytest.mark.parametrize(
    "text, message",
    [
        ("blend(softmax)", "attention 'blend': b is missing (type mixer)"),
        ("blend(3, softmax)", "attention 3: expected a mixer, such as gla or causal_conv(kernel=4)"),
        ("blend(softmax, none)", "attention none: expected a mixer, such as gla or causal_conv(kernel=4)"),
        ("blend(softmax, sofmax)", "unknown attention 'sofmax': did you mean 'softmax'?"),
        ("blend(softmax, causal_conv(kernal=2))", "'causal_conv' has no option 'kernal': did you mean 'kernel'"),
        ("blend(softmax, gla_conv(kernel=2))", "attention preset 'gla_conv' takes no options"),
        ("split(blend(softmax, causal_conv(kernel=0)), gla)", "attention 'causal_conv': kernel=0 is not valid"),
        ("blend(os:path, softmax)", "attention 'os:path' is not a subclass of megaresid.attention.mixer:Mixer"),
    ],
)
def test_mistakes_in_a_mixer_inside_another_are_those_of_that_mixer(text, message):
    with pytest.raises(UserError) as caught:
        ModelPlan(SHAPE, text)
    assert message in str(caught.value) and "\n" not in str(caught.value)
