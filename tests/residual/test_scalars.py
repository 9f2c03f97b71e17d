"""Scales, long skips and fixed multipliers: starts, rules and states as published, number by number."""

import pytest
import torch
from small_models import IDX, SHAPE, gradients_of, loss_of, model_of
from variant_models import layer_norm

from megaresid.config import OptimizerOptions
from megaresid.errors import UserError
from megaresid.model.gpt import canonical_parameters, canonical_rules, set_step
from megaresid.model.init import Constant, Normal
from megaresid.model.plan import ModelPlan
from megaresid.residual.stream import RESIDUALS
from megaresid.training.optimizer import parameter_groups


def rules_of(spec, layers=SHAPE.layers):
    model = model_of(spec, SHAPE.model_copy(update={"layers": layers}), away=0)
    return canonical_rules(model, model.prefixes, model.plan)


def states_of(spec, layers):
    """The names that enter every sublayer and the close."""
    plan = ModelPlan(SHAPE.model_copy(update={"layers": layers}), residual=spec)
    return [[entry.name for entry in plan.residual_of(0).state_spec(index)] for index in range(2 * layers + 1)]


@pytest.mark.parametrize(
    "spec, started",
    [
        ("rezero", {"scale": 0.0}),
        ("skip_init", {"scale": 0.0}),
        ("learned_scale", {"scale": 1.0}),
        ("adaptive_scale", {"base": 1.0, "strength": 0.0}),
        ("x0_blend", {"residual_lambda": 1.0, "x0_lambda": 0.0}),
        ("backout", {"backout_lambda": 0.2}),
        ("unet", {"skip_logit": -1.5}),
    ],
)
def test_scales_start_as_published_and_never_decay_nor_leave_fp32(spec, started):
    rules = rules_of(spec)
    for local, start in started.items():
        found = [rule for name, rule in rules.items() if name.endswith(f".{local}")]
        assert found and {(rule.start, rule.decay, rule.fp32) for rule in found} == {(Constant(start), False, True)}


def test_the_direction_that_projects_the_stream_decays():
    assert rules_of("adaptive_scale")["layers.00.mlp.site.direction"].decay


@pytest.mark.parametrize("layers, start", [(18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)])
def test_layer_scale_starts_by_depth(layers, start):
    """CaiT, section 2: 0.1 up to 18 layers, 1e-5 for 24, 1e-6 for deeper ones."""
    assert ModelPlan(SHAPE.model_copy(update={"layers": layers}), residual="layer_scale").residual_of(0).start == start


def test_x0_blend_starts_linearly_in_depth_and_x0_learns_faster():
    """nanochat's starts; modded-nanogpt's learning rate for x0, and the body's for the stream's own factor."""
    rules = rules_of("x0_blend(residual_first=1.15, residual_last=1.05, x0_first=0.2, x0_last=0.05)", layers=5)
    for layer in range(5):
        residual, x0 = (rules[f"layers.{layer:02d}.attention.site.{name}_lambda"] for name in ("residual", "x0"))
        assert residual.start.value == pytest.approx(1.15 - 0.10 * layer / 4)
        assert x0.start.value == pytest.approx(0.20 - 0.15 * layer / 4)
        assert (residual.lr_multiplier, x0.lr_multiplier) == (1.0, 5.0)


def test_states_hold_what_is_read_later_and_no_more():
    x, x0, mid = ["x"], ["x", "x0"], ["x", "x_mid"]
    assert states_of("x0_blend", 3) == [x, x0, x0, x0, x0, x, x]
    assert states_of("x0_blend", 1) == [x, x, x]
    assert states_of("backout", 4) == [*[x] * 7, mid, mid]  # after layer 2 x is x_mid itself
    assert states_of("backout", 3) == [*[x] * 5, mid, mid]
    one, two = ["x", "x_out_0"], ["x", "x_out_0", "x_out_1"]
    # Layer 2 of four joins the stream that it is given; layer 3 the output of layer 0.
    assert states_of("unet", 4) == [x, x, x, one, one, one, one, x, x]
    assert states_of("unet", 5) == [x, x, x, one, one, two, two, one, one, x, x]
    assert states_of("unet", 1) == [x, x, x]


@pytest.mark.parametrize("spec", ["rezero", "rezero(norm=false)", "skip_init", "skip_init(norm=true)"])
def test_at_first_the_model_is_the_identity_and_only_scales_and_embeddings_learn(spec):
    model = model_of(spec, away=0)
    parameters = canonical_parameters(model, model.prefixes)
    idx = IDX[:, :-1]
    embedding = parameters["embed.tokens.weight"]
    x0 = embedding[idx] + parameters["embed.positions.weight"][: idx.shape[1]]
    hidden = layer_norm(x0, {"norm.weight": 1.0, "norm.bias": 0.0}) if model.plan.residual_of(0).options.norm else x0
    torch.testing.assert_close(model(idx)[0], hidden @ embedding[: SHAPE.vocab_size].T, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients_of(model, loss_of(model)).items():
        learns = name.startswith(("embed.", "head.")) or name.endswith(".scale")
        assert bool(gradient.any()) == learns, name


def test_what_keeps_a_norm_that_the_paper_drops_is_not_exact():
    specs = "rezero", "rezero(norm=false)", "skip_init", "skip_init(norm=true)"
    fidelities = [ModelPlan(SHAPE, residual=spec).residual_of(0).fidelity for spec in specs]
    assert fidelities == ["own", "exact", "exact", "own"]


@pytest.mark.parametrize(
    "spec, lost",
    [
        ("3*backout + vanilla", "backout"),
        ("attention_residuals + delta_attention_residuals", "attention_residuals"),
    ],
)
def test_an_end_with_parameters_of_its_own_that_would_have_no_effect_is_refused(spec, lost):
    with pytest.raises(UserError, match=f"'{lost}' .* its end counts in the last layer only: put it last"):
        ModelPlan(SHAPE, residual=spec)
    ModelPlan(SHAPE, residual="3*vanilla + backout")


@pytest.mark.parametrize("name", RESIDUALS.classes())
def test_an_end_is_essential_where_it_has_parameters_beside_its_norm(name):
    variant = ModelPlan(SHAPE, residual=name).residual_of(0)
    close = variant.close_class(SHAPE, variant.options, len(variant.state_spec(2 * SHAPE.layers)))
    assert close.essential == any(not parameter.startswith("norm.") for parameter, _ in close.named_parameters())


def multipliers(model):
    return [buffer.item() for name, buffer in model.named_buffers() if name.endswith(".alpha")]


def test_pro_res_warms_up_layer_after_layer_and_ends_as_vanilla():
    model = model_of("pro_res(warmup=10)", away=0, dtype=torch.float32)
    assert not any("alpha" in name for name in model.state_dict()), "a function of the step is not saved"
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith(".alpha")]
    assert len(buffers) == 8 and {(buffer.shape, buffer.dtype) for buffer in buffers} == {((), torch.float32)}
    for step in (0, 1, 10, 15, 39):
        set_step(model, step)
        expected = [min(step / (10 * layer), 1) for layer in (1, 2, 3, 4) for _ in "am"]
        assert multipliers(model) == pytest.approx(expected) and min(multipliers(model)) < 1
    assert [id(buffer) for name, buffer in model.named_buffers() if name.endswith(".alpha")] == list(map(id, buffers))
    set_step(model, 40)
    vanilla = model_of("vanilla", away=0, dtype=torch.float32)
    assert torch.equal(model(IDX[:, :-1])[0], vanilla(IDX[:, :-1])[0])


def test_pro_res_is_the_same_in_training_and_evaluation():
    model = model_of("pro_res(warmup=10)", step=7)
    training = model(IDX[:, :-1])[0]
    assert torch.equal(training, model.eval()(IDX[:, :-1])[0])


@pytest.mark.parametrize("alpha, base_layers", [(1.0, 2), (0.5, 1), (0.75, 8)])
def test_complete_p_follows_table_1(alpha, base_layers):
    """arXiv 2505.01618, table 1 at m_N = 1: residual blocks m^(alpha - 1) and m^-alpha, all else as the base."""
    m = SHAPE.layers / base_layers
    rules = rules_of(f"complete_p(alpha={alpha}, base_layers={base_layers})")
    plain = rules_of("vanilla")
    assert rules.keys() == plain.keys()
    for name, rule in rules.items():
        in_block = name.startswith("layers.")
        assert rule.lr_multiplier == pytest.approx(m ** (alpha - 1) if in_block else 1), name
        assert rule.epsilon_multiplier == pytest.approx(m**-alpha if in_block else 1), name
        assert rule.decay == plain[name].decay, name
        hidden = in_block and name.endswith("weight") and "norm" not in name
        assert rule.start == (Normal(0.02) if hidden else plain[name].start), name


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_complete_p_reaches_the_optimizer_in_groups_of_its_own(alpha):
    """Four times as deep as the base; at alpha = 1 the epsilon alone tells the groups apart."""
    model = model_of(f"complete_p(alpha={alpha}, base_layers=1)", away=0)
    parameters = canonical_parameters(model, model.prefixes)
    rules = canonical_rules(model, model.prefixes, model.plan)
    options = OptimizerOptions(learning_rate=0.1, min_learning_rate=0.0)
    groups = parameter_groups(parameters, rules, options, epsilon=1e-6)
    assert len({group["name"] for group in groups}) == len(groups) == 4
    group_of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in parameters.items():
        group, in_block = group_of[id(parameter)], name.startswith("layers.")
        assert group["lr"] == pytest.approx(0.1 * 4 ** (alpha - 1) if in_block else 0.1), name
        assert group["eps"] == pytest.approx(1e-6 / 4**alpha if in_block else 1e-6), name
