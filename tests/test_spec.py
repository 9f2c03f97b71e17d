"""The language of layer specs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaresid.errors import UserError
from megaresid.spec import Component, Options, Pattern, Registry, fingerprint, parse_pattern


def only(text: str) -> Component:
    ((_, component),) = parse_pattern(text).terms
    return component


def test_patterns_repeat_over_the_depth():
    pattern = parse_pattern("3*gated_delta_net(expand_v=1.5) + softmax")
    names = [component.name for component in pattern.over(10)]
    assert names == ["gated_delta_net"] * 3 + ["softmax"] + ["gated_delta_net"] * 3 + ["softmax"] + ["gated_delta_net"] * 2


def test_values_have_their_types():
    component = only("a.b:Mixer( i=-3, f = 1e-3 ,yes=TRUE, no=false, nothing=none, word=swish )")
    assert component.name == "a.b:Mixer"
    expected = {"i": -3, "f": 1e-3, "yes": True, "no": False, "nothing": None, "word": "swish"}
    assert dict(component.options) == expected
    assert [type(v) for _, v in component.options] == [type(v) for v in expected.values()]


words = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda w: w not in ("true", "false", "none"))
values = st.integers() | st.booleans() | st.none() | words | st.floats(allow_nan=False, allow_infinity=False)
components = st.builds(
    lambda name, options: Component(name, tuple(options.items())), words, st.dictionaries(words, values, max_size=3)
)


@given(st.lists(st.tuples(st.integers(1, 9), components), min_size=1, max_size=4))
def test_what_is_printed_parses_to_the_same(terms):
    pattern = Pattern(tuple(terms))
    assert parse_pattern(str(pattern)) == pattern


@given(st.text(max_size=40))
def test_any_text_parses_or_is_one_line_of_error(text):
    try:
        parse_pattern(text)
    except UserError as error:
        assert repr(text) in str(error)


@pytest.mark.parametrize("text", ["", "a +", "0*a", "1.5*a", "a(", "a(x=1, 2)", "a(x=)", "a(x=1 y=2)", "a(x=1,x=2)", "a b", "a)"])
def test_malformed_specs_show_the_place(text):
    with pytest.raises(UserError, match=r"^layer spec .* at character \d+$"):
        parse_pattern(text)


class Streams(Options):
    streams: int = 4
    dynamic: bool = True


def registry() -> Registry:
    made = Registry("residual", "megaresid.residual", "megaresid.residual.stream:ResidualVariant")

    @made.register("hyper")
    class Hyper:
        Options = Streams

    return made


def test_options_are_checked_and_defaults_filled_in():
    cls, options = registry().resolve(only("hyper(streams=2)"))
    assert cls.name == "hyper" and options == Streams(streams=2, dynamic=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("hiper", "unknown residual 'hiper': did you mean 'hyper'"),
        ("hyper(stream=2)", "residual 'hyper' has no option 'stream': did you mean 'streams'"),
        ("hyper(streams=many)", "streams=many is not valid .*type int, default 4"),
        ("no_such_module:Thing", "cannot import residual 'no_such_module:Thing'"),
    ],
)
def test_mistakes_name_the_value_and_the_mend(text, message):
    with pytest.raises(UserError, match=message):
        registry().resolve(only(text))


def test_the_fingerprint_ignores_the_order_of_keys_only():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) != fingerprint({"a": 1, "b": [2, 1]})
