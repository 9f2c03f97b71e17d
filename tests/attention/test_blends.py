"""What blends, splits and skips take over from the mixers inside them, and how they start."""

import math
import sys
import types

import pytest
import torch
from small_models import move_away
from torch import nn

from megaresid.attention.gates import GATES
from megaresid.attention.mixer import MIXERS, SEGMENT, Mixer
from megaresid.errors import UserError
from megaresid.model.flops import forward_flops_per_token
from megaresid.model.gpt import GPT, build, canonical_parameters, canonical_rules
from megaresid.model.init import Normal, XavierNormal
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS, ModelShape

SHAPE = ModelShape(layers=3, heads=4, width=16, context=12, vocab_size=40, end_of_text=0)
IDX = torch.randint(40, (2, 13), generator=torch.Generator().manual_seed(0))


class Plain(Mixer):
    """Takes one input, keeps no documents apart and cannot go on; a user's first try."""

    needs = "a quiet room"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.o_proj = nn.Linear(arguments[0].width, arguments[0].width, bias=False)

    def forward(self, x, side, cache=None):
        return self.o_proj(x.cumsum(1)), side

    @classmethod
    def flops_per_token(cls, shape, options):
        return 7


@pytest.fixture(autouse=True)
def users_own(monkeypatch):
    module = types.ModuleType("users")
    module.Plain = Plain
    monkeypatch.setitem(sys.modules, "users", module)
    monkeypatch.setattr(Plain, "__module__", "users")


def model_of(attention: str, documents: bool = False, away: float = 0.2) -> GPT:
    model = build(ModelPlan(SHAPE, attention, documents=documents), seed=0).double()
    move_away(canonical_parameters(model, model.prefixes), away, SHAPE.vocab_size)
    return model


def rules_of(attention: str, residual: str = "vanilla"):
    with torch.device("meta"):
        model = GPT(ModelPlan(SHAPE, attention, residual))
    return canonical_rules(model, model.prefixes, model.plan)


NESTED = "blend(split(softmax, skip(gla)), delta_net)"
OUTPUT_PROJECTIONS = ["a.a.o_proj", "a.b.a.o_proj", "b.o_proj"]


@pytest.mark.parametrize(
    "residual, start",
    [
        ("vanilla", Normal(0.02 / math.sqrt(6))),
        ("skip_init", Normal(0.02)),
        ("hyper_connections(streams=2, out_scale=true)", Normal(0.02 / math.sqrt(12))),
        ("deep_norm", XavierNormal((8 * 3) ** -0.25)),
    ],
)
def test_output_projections_inside_start_like_a_mixers_own(residual, start):
    """And the matrices that read start like a mixer's own that read."""
    rules = rules_of(NESTED, residual)
    for layer in range(3):
        for inner in OUTPUT_PROJECTIONS:
            assert rules[f"layers.{layer:02d}.attention.{inner}.weight"].start == start, inner
    plain = rules_of("softmax", residual)
    for own, inner in (("o_proj", "b.o_proj"), ("q_proj", "a.a.q_proj"), ("k_proj", "a.b.a.k_proj")):
        assert rules[f"layers.01.attention.{inner}.weight"] == plain[f"layers.01.attention.{own}.weight"]


def test_what_is_drawn_is_what_the_rules_say():
    shape = SHAPE.model_copy(update={"width": 128, "layers": 2})
    parameters = canonical_parameters(model := build(ModelPlan(shape, NESTED), seed=0), model.prefixes)
    for inner in OUTPUT_PROJECTIONS:
        std = parameters[f"layers.01.attention.{inner}.weight"].std().item()
        assert std == pytest.approx(0.02 / 2, rel=0.05), inner  # 64 x 64 draws at least: 0.05 is 4.5 deviations


@pytest.mark.parametrize("spec", ["blend(delta_net, causal_conv, gate=per_head)", "skip(delta_net)"])
def test_a_blend_of_learned_weights_starts_as_the_mean_and_a_scaled_skip_as_its_mixer(spec):
    mixer, x = model_of(spec, away=0).parts[2].attention, torch.randn(2, 5, 16, dtype=torch.float64)
    outputs = [getattr(mixer, name)(x, ())[0] for name in ("a", "b") if hasattr(mixer, name)]
    torch.testing.assert_close(mixer(x, ())[0], sum(outputs) / len(outputs), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", GATES)
def test_gates_are_weights_of_blocks_of_channels_in_fp32(name):
    gate = GATES[name](SHAPE)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        s = gate(x)
    assert s.dtype == torch.float32 and 0 < s.min() and s.max() < 1
    heads = s.unflatten(-1, (4, 4))
    assert (name == "per_token_channel") == bool((heads != heads[..., :1]).any())
    assert s.shape == ((16,) if name == "per_head" else (2, 3, 16))
    assert len(heads[..., 0].reshape(-1, 4).unique(dim=0)) == (1 if name == "per_head" else 6)


def test_a_blend_that_is_all_of_one_mixer_is_that_mixer():
    """Also of one that shares values over the layers: the side channel passes through it."""
    whole, blend = model_of("value_residual"), model_of("blend(causal_conv, value_residual, gate=per_head)")
    theirs, parameters = whole.state_dict(), blend.state_dict()
    with torch.no_grad():
        for name, value in parameters.items():
            if name.endswith("gate.logit"):
                value.fill_(-60.0)
            elif ".attention.a." not in name:
                value.copy_(theirs[name.replace(".attention.b.", ".attention.")])
    loss, expected = (model(IDX[:, :-1], IDX[:, 1:])[1] for model in (blend, whole))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("spec", ["skip(users:Plain)", "blend(softmax, users:Plain)", "split(users:Plain, gla)"])
def test_a_mixer_inside_says_what_the_whole_can_do(spec):

    def told(spec):
        cls, options = ModelPlan(SHAPE, spec).mixer_class(0)
        able = cls.ways_of(options), SEGMENT in cls.reads_of(options), cls.decodes_of(options)
        return *able, cls.needs_of(options)

    assert told(spec) == (False, False, False, "a quiet room")
    assert told(spec.replace("users:Plain", "causal_conv")) == (True, True, True, "")
    assert build(ModelPlan(SHAPE, spec), seed=0).init_cache(5) is None
    with pytest.raises(UserError, match="cannot keep documents apart"):
        ModelPlan(SHAPE, spec, documents=True)
    with pytest.raises(UserError, match="separate inputs for q, k and v"):
        ModelPlan(SHAPE, spec, "mudd_former")


def test_positions_and_recurrences_and_flops_are_those_of_the_mixers_inside():
    shape = PRESETS["gpt2-medium"]
    plans = {spec: ModelPlan(shape, spec) for spec in ("gla", "delta_net", "softmax", "blend(gla, delta_net)")}
    kinds = {spec: plan.mixer_class(0)[0].kinds(shape, plan.mixer_class(0)[1]) for spec, plan in plans.items()}
    assert kinds["blend(gla, delta_net)"] == kinds["gla"] | kinds["delta_net"] and len(kinds["gla"]) == 1
    assert not plans["blend(gla, delta_net)"].has_positions
    assert ModelPlan(shape, "blend(gla, skip(softmax))").has_positions
    flops = {spec: forward_flops_per_token(plan)["attention"] for spec, plan in plans.items()}
    gate = 24 * 2 * 1024 * 1024
    assert flops["blend(gla, delta_net)"] == flops["gla"] + flops["delta_net"] + gate
    (half,) = MIXERS.classes()["split"].kinds(shape, ModelPlan(shape, "split(gla, gla)").mixer_class(0)[1])
    assert {half} == kinds["gla"]  # as wide a head, of half as many


@pytest.mark.parametrize("share, heads", [(0.5, 2), (0.3, 1), (0.9, 3), (0.75, 3)])
def test_a_share_is_of_whole_heads(share, heads):
    mixer = model_of(f"split(softmax, causal_conv, share={share})").parts[2].attention
    assert mixer.a.q_proj.in_features == 4 * heads and mixer.a.heads == heads
    assert mixer.b.conv1d.weight.shape == (16 - 4 * heads, 1, 4)


def test_a_whole_model_goes_on_from_its_cache():
    """Prompt, then tokens, across documents: each mixer inside has its own part of the cache."""
    model = model_of("blend(softmax(positions=none), causal_conv) + gla_delta_split + skip(delta_net)", documents=True)
    idx = IDX.clone()
    idx[:, [4, 9]] = SHAPE.end_of_text
    whole, cache = model(idx)[0], model.init_cache(13)
    pieces = [model(part, cache=cache)[0] for part in idx.split((6, 1, 1, 3, 1, 1), 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("split(gla, gla, share=0.2)", "'split': share=0.2 of 4 heads is no whole head for its first mixer"),
        ("split(gla, gla, share=0)", "share=0 is not valid \\(Input should be greater than 0;"),
        ("split(value_residual, gla)", "'split': 'value_residual' shares tensors of the whole width over the layers"),
        ("split(gla, blend(gla, value_residual))", "'split': 'blend' shares tensors of the whole width over"),
        ("split(gla(heads=3), gla)", "'gla': expand_k=0.5 of width 8 is 4, which 3 heads do not divide"),
        ("blend(gla, skip(gla(heads=3)))", "'gla': expand_k=0.5 of width 16 is 8, which 3 heads do not divide"),
        ("causal_conv(act=gelu)", "act=gelu is not valid"),
        ("skip(gla, output_gate=scale)", "output_gate=scale is not valid"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        ModelPlan(SHAPE, spec)
    assert "\n" not in str(caught.value)


C, H = 1024, 16
GLA = 4 * C * C + 16 * C + 16 * (C // 2) + C // 2 + C // H
DELTA_NET = 4 * C * C + C * H + 3 * 4 * C + C // H


@pytest.mark.parametrize(
    "name, count",
    [
        ("gla_conv", GLA + 4 * C + C * C + C),
        ("delta_linear", DELTA_NET + 4 * C * C + C // H + C * H + H),
        ("delta_skip", DELTA_NET + C * H + H + H),
        (
            "gla_delta_split",  # half the width and half the heads; GLA's convolutions, DeltaNet's gate
            (4 * (C // 2) ** 2 + 16 * (C // 2) + 16 * (C // 4) + C // 4 + C // H + 4 * (C // 4 + C // 4 + C // 2))
            + (5 * (C // 2) ** 2 + (C // 2) * (H // 2) + 3 * 4 * (C // 2) + C // H),
        ),
    ],
)
def test_presets_have_the_parameters_counted_by_hand(name, count):
    plan = ModelPlan(PRESETS["gpt2-medium"], name)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in plan.mixer_of(0).parameters()) == count
    assert not plan.has_positions
