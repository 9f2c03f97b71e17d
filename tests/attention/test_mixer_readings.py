"""What mixers show of themselves, against formulas of the papers with the same parameters, away from initialisation."""

import math

import pytest
import torch
from define_blends import gate as gate_of
from define_linear import heads_of, identity, linear, projected, sigmoid, swish
from mixer_models import SEGMENT, Mixers, inputs
from mixer_table import ONE_OF_EACH, ROWS
from torch import Tensor
from torch.nn.functional import softplus

from megaresid.attention import nested
from megaresid.attention.mixer import MIXERS, Mixer
from megaresid.attention.nested import Nested
from megaresid.model.presets import ModelShape
from megaresid.readings import Values
from megaresid.spec import Options

SILENT = {
    **dict.fromkeys(("softmax", "causal_conv", "linear_attention"), "projections, norms and taps alone"),
    "fla": "its layer is flash-linear-attention's, and says nothing of itself",
}
"""Mixers that show nothing, and why."""


def over_tokens(x: Tensor) -> Tensor:
    return x.mean(dim=(0, 1))


def output_gate(p, x_v, act, heads):
    return {"output_gate": over_tokens(act(heads_of(linear(x_v, p, "g_proj"), heads)))} if "g_proj.weight" in p else {}


def gated(mixer, p, x_k, x_v, segment, options):
    """GLA and simple GLA: alpha = sigmoid(logit)^(1/tau), arXiv 2312.06635, section 4.4."""
    tau, by_channel = options.gate_logit_normalizer, "gk_proj.1.weight" in p
    logits = linear(linear(x_k, p, "gk_proj.0"), p, "gk_proj.1") if by_channel else linear(x_k, p, "gk_proj")
    alpha = sigmoid(heads_of(logits, mixer.heads) if by_channel else logits) ** (1 / tau)
    if by_channel and options.clamp_min is not None:
        alpha = alpha.clamp(min=math.exp(options.clamp_min))
    acts = {"swish": swish, "identity": identity}
    gate = output_gate(p, x_v, acts[options.gate_fn], mixer.heads)
    return {"decay": over_tokens(alpha) if by_channel else alpha, **gate}


def constant(mixer, p, x_k, x_v, segment, options):
    """Retention and lightning attention, whose decays nobody learns."""
    return output_gate(p, x_v, {"swish": swish, "sigmoid": sigmoid, "identity": identity}[options.gate_fn], mixer.heads)


def hgrn2(mixer, p, x_k, x_v, segment, options):
    """f = b + (1 - b) sigmoid(W_f x), arXiv 2404.07904, b the layer's."""
    f = sigmoid(heads_of(projected(p, "f", x_k, segment, identity), mixer.heads))
    return {"decay": over_tokens(mixer.bound + (1 - mixer.bound) * f)}


def mamba2(mixer, p, x_k, x_v, segment, options):
    """exp(-exp(A) dt), dt = softplus(w . u + b), arXiv 2405.21060."""
    dt = softplus(linear(x_k, p, "dt_proj") + p["dt_bias"])
    decay = torch.exp(-torch.exp(p["A_log"]) * dt)
    return {"decay": decay, "write": dt, "skip": p["D"], "output_gate": over_tokens(swish(linear(x_v, p, "g_proj")))}


def beta(p, x_k, options):
    strongest = 2 if options.allow_neg_eigval else 1
    return {"beta": strongest * sigmoid(linear(x_k, p, "b_proj"))} if "b_proj.weight" in p else {}


def delta_net(mixer, p, x_k, x_v, segment, options):
    return beta(p, x_k, options) | output_gate(p, x_v, swish, mixer.heads)


def gated_delta_net(mixer, p, x_k, x_v, segment, options):
    """alpha = exp(-exp(A_log) softplus(a x + dt_bias)), arXiv 2412.06464."""
    alpha = torch.exp(-torch.exp(p["A_log"]) * softplus(linear(x_k, p, "a_proj") + p["dt_bias"]))
    act = sigmoid if options.output_gate_activation == "sigmoid" else swish
    return {"decay": alpha} | beta(p, x_k, options) | output_gate(p, x_v, act, mixer.heads)


def kda(mixer, p, x_k, x_v, segment, options):
    """arXiv 2510.26692, section 4, one decay a channel; with a bound b: exp(b sigmoid(exp(A_log) logit))."""
    logits = heads_of(linear(linear(x_k, p, "f_proj.0"), p, "f_proj.1") + p["dt_bias"], mixer.heads)
    rate, least = torch.exp(p["A_log"])[:, None], options.lower_bound
    alpha = torch.exp(-rate * softplus(logits) if least is None else least * sigmoid(rate * logits))
    gate = over_tokens(heads_of(sigmoid(linear(linear(x_v, p, "g_proj.0"), p, "g_proj.1")), mixer.heads))
    return {"decay": over_tokens(alpha), "output_gate": gate} | beta(p, x_k, options)


def value_residual(mixer, p, x_k, x_v, segment, options):
    return {"first_values": p["first"], "own_values": p["own"]} if options.learned and "first" in p else {}


def sigmoid_gate(p, name, x_v, heads):
    """A number for every token and head, for every head, or the mean over the tokens of one for every channel."""
    whole, width = gate_of(p, name, x_v, heads), x_v.shape[-1] // heads
    if f"{name}.logit" in p:
        return whole[0, 0, ::width]
    return over_tokens(whole) if len(p[f"{name}.bias"]) == x_v.shape[-1] else whole[..., ::width]


def skip(mixer, p, x_v, heads):
    gates = {"skip": p["gate.scale"] if "gate.scale" in p else sigmoid_gate(p, "gate", x_v, heads)}
    if mixer.output_gate is not None:
        gates["output_gate"] = sigmoid_gate(p, "output_gate", x_v, heads)
    return gates


LEAVES = {
    **dict.fromkeys(("gla", "simple_gla"), gated),
    **dict.fromkeys(("retention", "lightning"), constant),
    **{f.__name__: f for f in (hgrn2, mamba2, delta_net, gated_delta_net, kda, value_residual)},
}
"""Of the mixers that have no other inside, what they show."""

AROUND = {
    "blend": lambda mixer, p, x_v, heads: {"gate": sigmoid_gate(p, "gate", x_v, heads)},
    "skip": skip,
    "split": lambda mixer, p, x_v, heads: {},
}
"""Of the mixers around others, what they show beside theirs."""


def parts_of(name, shape: ModelShape, options: Options, x):
    """The inputs and the shape that each mixer inside sees."""
    if name != "split":
        return {inner: (x, shape) for inner in nested.chosen_in(options)}
    cut = int(options.share * shape.heads)
    width = shape.width // shape.heads
    a, b = (shape.model_copy(update={"heads": h, "width": h * width}) for h in (cut, shape.heads - cut))
    return {"a": (tuple(w[..., : a.width] for w in x), a), "b": (tuple(w[..., a.width :] for w in x), b)}


def expected(mixer: Mixer, cls, options: Options, shape: ModelShape, x, segment) -> dict[str, Tensor]:
    name, p, (_, x_k, x_v) = MIXERS.name_of(cls), dict(mixer.named_parameters()), x
    if name in SILENT:
        return {}
    if name in LEAVES:
        return LEAVES[name](mixer, p, x_k, x_v, segment, options)
    found = AROUND[name](mixer, p, x_v, shape.heads)
    for inner, (part, its_shape) in parts_of(name, shape, options, x).items():
        chosen = getattr(options, inner)
        theirs = expected(getattr(mixer, inner), chosen.cls, chosen.options, its_shape, part, segment)
        found |= {f"{inner}.{key}": value for key, value in theirs.items()}
    return found


def layers_of(mixers: Mixers, x, segment):
    """Every mixer of a row with the side channel that enters it."""
    side = () if segment is None else (segment,)
    for mixer, kept in zip(mixers.mixers, mixers.kept):
        yield mixer, side
        _, side = mixer(x, side)
        side = tuple(side[position] for position in kept)


@pytest.mark.parametrize(
    ("documents", "ways"),
    [
        pytest.param(True, True, id="documents, three inputs"),
        pytest.param(False, False, id="one input", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("row", ROWS, ids=str)
@torch.no_grad()
def test_readings_equal_the_formulas(row, documents, ways):
    mixers = Mixers(row, documents)
    segment = SEGMENT if documents else None
    x = tuple(inputs(row, seed=seed) for seed in range(3)) if ways else inputs(row)
    for layer, (mixer, side) in enumerate(layers_of(mixers, x, segment)):
        cls, options = mixers.plan.mixer_class(layer)
        wanted = expected(mixer, cls, options, mixers.shape, x if ways else (x, x, x), segment)
        found = mixer.diagnose(x, side)
        assert found.keys() == wanted.keys()
        for name, reading in found.items():
            assert isinstance(reading, Values) and reading.values.shape == wanted[name].shape, name
            assert (reading.values - wanted[name]).abs().max() <= 1e-12 * wanted[name].abs().max(), name


def test_every_mixer_shows_something_or_is_listed_with_its_reason():
    assert LEAVES.keys() | AROUND.keys() | SILENT.keys() == MIXERS.classes().keys()
    assert not SILENT.keys() & (LEAVES.keys() | AROUND.keys())


@pytest.mark.parametrize(
    ("spec", "second"),
    [("value_residual", []), ("value_residual(learned=true, first=0.25)", ["first_values", "own_values"])],
)
@torch.no_grad()
def test_weights_of_values_are_shown_where_they_are_learned_and_not_of_the_layer_that_gives_them(spec, second):
    (row,) = [row for row in ROWS if row.spec == spec]
    mixers, x = Mixers(row), inputs(row)
    assert [list(mixer.diagnose(x, side)) for mixer, side in layers_of(mixers, x, None)] == [[], second]


@pytest.mark.parametrize("row", ONE_OF_EACH, ids=str)
def test_readings_change_nothing_and_are_small_copies_without_gradients(row):
    mixers = Mixers(row, dtype=torch.float32)
    x = inputs(row, length=48).float()
    random, before = torch.get_rng_state(), x.clone()
    with torch.no_grad():
        places = list(layers_of(mixers, x, None))
    shown = [reading.values for mixer, side in places for reading in mixer.diagnose(x, side).values()]
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, before)
    kept = [values.clone() for values in shown]
    with torch.no_grad():
        for mixer in mixers.mixers:
            for parameter in mixer.parameters():
                parameter.zero_()
    for values, copy in zip(shown, kept):
        assert torch.equal(values, copy) and values.dtype == torch.float32 and not values.requires_grad
        assert values.numel() < x.numel()  # less than one tensor of the stream


@pytest.mark.parametrize("row", ONE_OF_EACH, ids=str)
@torch.no_grad()
def test_readings_under_autocast_are_those_of_fp32_but_for_the_rounding_of_products(row):
    mixers, x = Mixers(row, dtype=torch.float32), inputs(row).float()
    for mixer, side in layers_of(mixers, x, None):
        exact = mixer.diagnose(x, side)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = mixer.diagnose(x, side)
        assert rounded.keys() == exact.keys()
        for name, reading in exact.items():
            error = (rounded[name].values - reading.values).abs().max()
            assert error < 0.02 * reading.values.abs().max(), name


class Adding(Mixer):
    """Adds its input to the side channel."""

    @classmethod
    def side_spec(cls, shape, options, entering):
        return (*entering, ("x", (shape.width,)))

    def forward(self, x, side, cache=None):
        return x, (*side, x)


class Reading(Mixer):
    """Shows what was added last."""

    def forward(self, x, side, cache=None):
        return x, side

    def diagnose(self, x, side):
        return {"added": Values(side[-1])}


class Pair(Nested):
    Options = Options

    @classmethod
    def inside(cls, shape, options):
        return {"a": (Adding, shape, Options()), "b": (Reading, shape, Options())}


def test_a_mixer_inside_sees_what_the_one_before_it_adds_to_the_side_channel():
    x = torch.randn(1, 2, 4)
    pair = Pair(ModelShape(layers=1, heads=2, width=4, context=8, vocab_size=40), Options(), 0)
    found = pair.diagnose(x, ())
    assert list(found) == ["b.added"] and torch.equal(found["b.added"].values, x)
