"""Layer specs by their grammar and by noise."""

from hypothesis import strategies as st

NAMES = ["softmax", "gla", "gated_delta_net", "retention", "mamba2", "linear_attention", "kimi_delta_attention"]
NAMES += ["vanilla", "hyper_connections", "denseformer", "layer_scale", "rezero", "mudd", "laurel", "value_residual"]
NAMES += ["blend", "nested", "causal_conv", "split", "skip", "deep_norm", "no_such_thing", "true", "none", "a.b:C"]
OPTIONS = ["streams", "dynamic", "window", "heads", "kernel", "gate", "expand_k", "expand_v", "alpha", "rank", "period"]
NUMBERS = ["0", "1", "2", "3", "4", "7", "-1", "0.5", "1e3", "1e999", "-0.0", "9" * 30, "9" * 200, "1.", ".5", "007"]
NOISE = list("()=,*+|-:. \t\n\0é²٣\u2028'\"") + ["\ud800", "((", "3*", "||"]


def _values(components):
    return st.one_of(st.sampled_from(NUMBERS + ["true", "false", "none"]), st.sampled_from(NAMES), components)


def _component(components):
    option = st.builds("{}={}".format, st.sampled_from(OPTIONS), _values(components))
    given = st.lists(st.one_of(option, option, _values(components)), max_size=3).map(", ".join)
    return st.one_of(st.sampled_from(NAMES), st.builds("{}({})".format, st.sampled_from(NAMES), given))


def specs() -> st.SearchStrategy[str]:
    """By the grammar, with names and options that may be unknown or belong to others."""
    component = st.recursive(st.sampled_from(NAMES), _component, max_leaves=4)
    count = st.sampled_from(["", "", "", "2*", "3 * ", "0*", "1000000000*", "1e3*"])
    terms = st.lists(st.builds(str.__add__, count, component), min_size=1, max_size=3).map(" + ".join)
    with_ends = st.builds("{} | {} | {}".format, terms, terms, terms)
    return st.one_of(terms, terms, with_ends, st.builds("{}|{}|".format, terms, terms))


def _noisy(text: str, places: list[tuple[int, str]]) -> str:
    for place, noise in places:
        at = place % (len(text) + 1)
        text = text[:at] + noise + text[at + place % 3 :]
    return text


def spec_texts() -> st.SearchStrategy[str]:
    """Specs by the grammar, and such with noise in them, and noise, and nests deeper than anybody's."""
    noise = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(NOISE)), min_size=1, max_size=3)
    nests = st.integers(1, 3000).map(lambda depth: "blend(" * depth + "gla" + ")" * depth)
    return st.one_of(specs(), specs(), specs(), st.builds(_noisy, specs(), noise), st.text(max_size=20), nests)
