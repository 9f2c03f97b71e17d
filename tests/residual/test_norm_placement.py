"""What is known of the norm placements beyond their equations: fixed points, invariances, and where weights start."""

import pytest
import torch
from small_models import IDX, SHAPE, model_of

from megaresid.errors import UserError
from megaresid.model.gpt import build, canonical_parameters, canonical_rules
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape

TOKENS = IDX[:, :-1]

SHARP = SHAPE.model_copy(update={"norm_epsilon": 1e-12})
"""With it a norm of a norm is that norm."""

WIDE = ModelShape(layers=3, heads=2, width=128, context=8, vocab_size=40)
"""Matrices of 16384 entries and more: a drawn standard deviation is within 3% of its distribution's."""


def drawn(spec: str) -> dict[str, torch.Tensor]:
    model = build(ModelPlan(WIDE, residual=spec), seed=0)
    return {name: parameter.detach() for name, parameter in canonical_parameters(model, model.prefixes).items()}


def test_deep_norm_draws_its_matrices_from_xavier_normals():
    """Figure 2: gain beta = (8M)^(-1/4) for ffn, v_proj and out_proj, gain 1 for q_proj and k_proj."""
    beta, width, found = (8 * 3) ** -0.25, 128, drawn("deep_norm")
    square, oblong = (2 / (width + width)) ** 0.5, (2 / (width + 4 * width)) ** 0.5
    expected = {
        "attention.q_proj": square,
        "attention.k_proj": square,
        "attention.v_proj": beta * square,
        "attention.o_proj": beta * square,
        "mlp.fc": beta * oblong,
        "mlp.proj": beta * oblong,
    }
    for layer in range(3):
        for name, std in expected.items():
            weight = found[f"layers.{layer:02d}.{name}.weight"]
            assert weight.std().item() == pytest.approx(std, rel=0.03), name
            assert weight.abs().max() > 2.5 * std, "a uniform distribution ends at 1.73"
            assert not found[f"layers.{layer:02d}.{name}.bias"].any(), name
    assert torch.equal(found["embed.tokens.weight"], drawn("vanilla")["embed.tokens.weight"])


UNSCALED = ["post_ln", "sandwich", "peri_ln", "keel", "layer_norm_scaling", "rezero", "skip_init", "layer_scale"]


@pytest.mark.parametrize("spec", UNSCALED)
def test_output_projections_start_unscaled_where_depth_is_seen_to_otherwise(spec):
    found, vanilla = drawn(spec), drawn("vanilla")
    for name in ("layers.01.attention.o_proj.weight", "layers.01.mlp.proj.weight"):
        assert found[name].std().item() == pytest.approx(0.02, rel=0.03)
        assert torch.allclose(found[name], vanilla[name] * (2 * 3) ** 0.5, rtol=1e-6)
    assert torch.equal(found["layers.01.mlp.fc.weight"], vanilla["layers.01.mlp.fc.weight"])


@pytest.mark.parametrize(
    "spec", ["siamese_norm", "parallel", "parallel_rescaled", "learned_scale", "layer_scale(start=1)"]
)
def test_sublayers_start_like_vanillas_where_updates_add_up(spec):
    found, vanilla = drawn(spec), drawn("vanilla")
    assert all(torch.equal(found[name], vanilla[name]) for name in vanilla if ".site." not in name)


@pytest.mark.parametrize("spec", ["post_ln", "deep_norm", "keel"])
def test_the_normed_stream_has_unit_scale_at_every_depth_and_no_final_norm(spec):
    model = model_of(spec, SHARP, away=0)
    assert not model.parts[-1].state_dict()
    state = model.parts[1](model.parts[0](TOKENS))
    for layer in model.parts[2:-1]:
        (x,) = state = layer(state)
        assert x.mean(-1).abs().max() < 1e-9
        # The embeddings' variance is 8e-4, of which epsilon is 1e-9.
        assert (x.var(-1, correction=0) - 1).abs().max() < 1e-8
    assert torch.equal(model.parts[-1](state), x)


def test_keels_first_layer_has_no_alpha_and_its_attention_no_outer_norm():
    """The first attention is pre-LN: what it adds to a stream ten times as large is what it adds to the stream."""
    model = model_of("keel", SHARP)
    layer, x = model.parts[2], torch.randn(2, 8, SHAPE.width, dtype=torch.float64)
    site = layer.sites["attention"]
    (small,), _ = site((x,), (), layer.attention)
    (large,), _ = site((10 * x,), (), layer.attention)
    assert torch.allclose(large - 10 * x, small - x, atol=1e-9)
    assert "norm_out.weight" not in site.state_dict()
    assert [layer.sites["mlp"].alpha for layer in model.parts[2:-1]] == [1, 8, 8, 8]


@pytest.mark.parametrize("spec", ["sandwich", "peri_ln"])
def test_an_output_norm_takes_the_scale_of_the_output_projections_away(spec):
    model = model_of(spec, SHARP)
    before = model(TOKENS)[0]
    with torch.no_grad():
        for layer in model.parts[2:-1]:
            for linear in (layer.attention.o_proj, layer.mlp.proj):
                linear.weight *= 7
                linear.bias *= 7
    assert torch.allclose(model(TOKENS)[0], before, rtol=1e-9, atol=1e-9)


def test_peri_ln_does_not_see_the_scale_of_the_embeddings():
    """Where the sandwich does: its unit updates drown embeddings of deviation 0.02."""
    moved = {}
    for spec in ("sandwich", "peri_ln"):
        model, x0 = model_of(spec, SHARP, away=0), torch.randn(2, 8, SHAPE.width, dtype=torch.float64)
        opening, layer = model.parts[1].opening, model.parts[2]
        small, large = layer(opening(0.02 * x0))[0], layer(opening(x0))[0]
        moved[spec] = ((large - small).norm() / large.norm()).item()
    assert moved["peri_ln"] < 1e-6 and moved["sandwich"] > 0.1


def test_siamese_norm_without_its_normed_stream_is_pre_ln():
    """The paper's "generalisation": with LN_X = 0 only the stream Y is left, read through LN(LN_Y(Y))."""
    model, vanilla = model_of("siamese_norm", SHARP, away=0), model_of("vanilla", SHARP, away=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm_post." in name:
                parameter.zero_()
    expected = vanilla(TOKENS)[0]
    assert torch.allclose(model(TOKENS)[0], expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_siamese_streams_start_as_two_tensors():
    """A pipeline breaks on one tensor that is sent twice."""
    x0 = torch.randn(2, 3, SHAPE.width)
    post, pre = model_of("siamese_norm").parts[1].opening(x0)
    assert torch.equal(post, x0) and torch.equal(pre, x0) and post.data_ptr() != pre.data_ptr()


def test_the_rescaled_parallel_layer_starts_as_the_parallel_one():
    """At its start LN_2 finds the result of LN_1 already normed, and s is 1."""
    found, expected = (model_of(spec, SHARP, away=0)(TOKENS)[0] for spec in ("parallel_rescaled", "parallel"))
    assert torch.allclose(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_the_scale_of_a_parallel_layer_is_one_undecayed_fp32_number():
    model = model_of("parallel_rescaled", away=0)
    name = "layers.01.parallel.site.scale"
    parameter = canonical_parameters(model, model.prefixes)[name]
    rule = canonical_rules(model, model.prefixes, model.plan)[name]
    assert parameter.tolist() == [1.0] and rule.fp32 and not rule.decay and rule.lr_multiplier == 1


def test_no_norm_decays():
    for spec in ("post_ln", "peri_ln", "keel", "siamese_norm", "parallel_rescaled"):
        model = model_of(spec)
        rules = canonical_rules(model, model.prefixes, model.plan)
        norms = [rule for name, rule in rules.items() if "norm" in name]
        assert norms and not any(rule.decay for rule in norms), spec


@pytest.mark.parametrize("spec", ["vanilla + 3*peri_ln", "2*sandwich + 2*peri_ln"])
def test_an_opening_that_would_have_no_effect_is_refused(spec):
    with pytest.raises(UserError, match="'peri_ln' .* its opening counts in layer 0 only: put it first"):
        ModelPlan(SHAPE, residual=spec)
    ModelPlan(SHAPE, residual="peri_ln + 3*vanilla")


def test_post_ln_and_pre_ln_mix_over_depth():
    """Mix-LN (Li et al. 2024, arXiv 2412.13795): post-LN in the lower layers, pre-LN in the upper ones."""
    model = model_of("2*post_ln + 2*vanilla")
    names = canonical_parameters(model, model.prefixes).keys()
    assert "head.norm.weight" in names
    post, pre = model.parts[3].sites["mlp"], model.parts[4].sites["mlp"]
    x = torch.randn(2, 8, SHAPE.width, dtype=torch.float64)
    (normed,), _ = post((x,), (), lambda read, side: (read, side))
    (added,), _ = pre((x,), (), lambda read, side: (0 * read, side))
    assert torch.allclose(normed, post.norm(2 * x)) and torch.equal(added, x)
