"""The value residual, against its definition and in the patterns in which its first layer is not the model's first."""

import pytest
import torch
from torch.nn import functional

from megaresid.model.gpt import build, canonical_parameters, canonical_rules
from megaresid.model.init import Constant
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape

SHAPE = ModelShape(layers=4, heads=2, width=16, context=6, vocab_size=30)
IDX = torch.randint(30, (2, 7), generator=torch.Generator().manual_seed(0))


def model_of(attention: str, away: float = 0.2, recompute: bool = False, residual: str = "vanilla"):
    """In fp64, every parameter moved by N(0, ``away``) that depends on its name alone."""
    model = build(ModelPlan(SHAPE, attention, residual), seed=0, activation_checkpointing=recompute).double()
    with torch.no_grad():
        for name, parameter in canonical_parameters(model, model.prefixes).items():
            generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
            parameter += away * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def parameters_of(model) -> dict[str, torch.Tensor]:
    return canonical_parameters(model, model.prefixes)


def gradients_of(model, loss) -> dict[str, torch.Tensor]:
    parameters = parameters_of(model)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


def layer_norm(x, p, name):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def attend(q, k, v):
    """Head by head and token by token."""
    size = SHAPE.width // SHAPE.heads
    heads = []
    for h in range(SHAPE.heads):
        part = slice(h * size, (h + 1) * size)
        tokens = []
        for t in range(q.shape[1]):
            scores = (k[:, : t + 1, part] * q[:, t : t + 1, part]).sum(-1) / size**0.5
            tokens.append((scores.softmax(-1)[..., None] * v[:, : t + 1, part]).sum(1))
        heads.append(torch.stack(tokens, 1))
    return torch.cat(heads, -1)


def loss_by_definition(p, weights, first):
    """V'_l = a_l V_first + b_l V_l in the layers of ``weights``; arXiv 2410.17897. Vanilla residuals."""
    x = p["embed.tokens.weight"][IDX[:, :-1]] + p["embed.positions.weight"]
    values = {}
    for layer in range(SHAPE.layers):
        name = f"layers.{layer:02d}"
        normed = layer_norm(x, p, f"{name}.attention.site.norm")
        q, k, v = (linear(normed, p, f"{name}.attention.{part}_proj") for part in "qkv")
        values[layer] = v
        if layer in weights:
            a, b = weights[layer]
            v = a * values[first] + b * v
        x = x + linear(attend(q, k, v), p, f"{name}.attention.o_proj")
        hidden = linear(layer_norm(x, p, f"{name}.mlp.site.norm"), p, f"{name}.mlp.fc")
        x = x + linear(functional.gelu(hidden, approximate="tanh"), p, f"{name}.mlp.proj")
    logits = layer_norm(x, p, "head.norm") @ p["embed.tokens.weight"][: SHAPE.vocab_size].T
    return functional.cross_entropy(logits.flatten(0, 1), IDX[:, 1:].flatten())


PATTERNS = {
    "value_residual": ({1: (0.5, 0.5), 2: (0.5, 0.5), 3: (0.5, 0.5)}, 0),
    "value_residual(first=0.25, own=2)": ({1: (0.25, 2), 2: (0.25, 2), 3: (0.25, 2)}, 0),
    "softmax + value_residual": ({3: (0.5, 0.5)}, 1),
    "value_residual + softmax": ({2: (0.5, 0.5)}, 0),
}


def assert_equals_the_definition(model, weights, first):
    loss, expected = model(IDX[:, :-1], IDX[:, 1:])[1], loss_by_definition(parameters_of(model), weights, first)
    assert abs(loss - expected) < 1e-10 * expected
    found, wanted = gradients_of(model, loss), gradients_of(model, expected)
    scale = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 1e-10 * max(gradient.norm(), 1e-6 * scale), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("attention", "definition"), PATTERNS.items(), ids=PATTERNS)
def test_loss_and_gradients_equal_the_definition(attention, definition, recompute):
    assert_equals_the_definition(model_of(attention, recompute=recompute), *definition)


def test_learned_weights_are_each_layers_own():
    model = model_of("value_residual(learned=true)")
    p = parameters_of(model)
    weights = {n: tuple(p[f"layers.{n:02d}.attention.{name}"] for name in ("first", "own")) for n in (1, 2, 3)}
    assert len([name for name in p if name.endswith((".first", ".own"))]) == 6, "none in the first layer"
    assert len({weight.item() for pair in weights.values() for weight in pair}) == 6
    assert_equals_the_definition(model, weights, first=0)


def test_learned_weights_start_where_they_are_said_to_and_do_not_decay():
    model = model_of("value_residual(first=0, own=1, learned=true)", away=0)
    rules = canonical_rules(model, model.prefixes, model.plan)
    for name, parameter in parameters_of(model).items():
        if name.endswith((".first", ".own")):
            assert rules[name].start == Constant(float(name.endswith(".own"))) and parameter.shape == (1,)
            assert rules[name].fp32 and not rules[name].decay


@pytest.mark.parametrize("learned", ["true", "false"])
def test_own_values_alone_are_softmax(learned):
    """The loss bit for bit, the gradients to rounding; and the learned weights all get one from there."""
    model, softmax = model_of(f"value_residual(first=0, own=1, learned={learned})", 0), model_of("softmax", 0)
    loss, expected = (m(IDX[:, :-1], IDX[:, 1:])[1] for m in (model, softmax))
    assert torch.equal(loss, expected)
    found, wanted = gradients_of(model, loss), gradients_of(softmax, expected)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-14 * max(g.norm() for g in wanted.values()), name
    assert all(found[name].norm() > 0 for name in found.keys() - wanted.keys())


def test_the_values_travel_no_further_than_they_are_read():
    plan = ModelPlan(SHAPE, "softmax + 2*value_residual + softmax")
    values = (("values", (SHAPE.heads, SHAPE.width // SHAPE.heads)),)
    assert [plan.side_spec(layer) for layer in range(5)] == [(), (), values, (), ()]


def test_the_values_are_those_of_muddformers_own_input():
    """Its layers give attention three inputs; V is of the third."""
    mixer = ModelPlan(SHAPE, "value_residual", "mudd_former").mixer_of(0)
    mixer = mixer.double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    q, k, v = (torch.randn(2, 5, SHAPE.width, dtype=torch.float64) for _ in range(3))
    _, (values,) = mixer((q, k, v), ())
    assert (values.flatten(-2) - (v @ mixer.v_proj.weight.T + mixer.v_proj.bias)).abs().max() < 1e-12
    assert torch.isfinite(model_of("value_residual", residual="mudd_former")(IDX[:, :-1], IDX[:, 1:])[1])


def test_under_bf16_autocast_the_weights_are_not_rounded():
    """0.5 and 0.5 + 1/1000 are one number in bf16."""
    x = torch.randn(2, 5, SHAPE.width, generator=torch.Generator().manual_seed(0))
    outputs = []
    for first in (0.5, 0.5005):
        mixer = model_of(f"value_residual(first={first})").float().parts[4].attention
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(mixer(x, (100 * torch.ones_like(x).unflatten(-1, (SHAPE.heads, -1)),))[0])
    assert not torch.equal(*outputs)
