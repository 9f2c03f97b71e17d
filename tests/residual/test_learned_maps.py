"""What LAuReL and Deep Delta Learning are known to break."""

import math

import pytest
import torch
from small_models import IDX, SHAPE, loss_of, model_of

from megaresid.errors import UserError
from megaresid.model.gpt import canonical_parameters, canonical_rules
from megaresid.model.plan import ModelPlan


def test_laurels_matrix_starts_with_orthogonal_rows():
    """Footnote 2 of arXiv 2411.07501: A_ij = 1/sqrt(r D) where i mod r = j, else 0."""
    A = model_of("laurel_lr(rank=3)", away=0).parts[2].sites["mlp"].map.A.weight
    for i in range(SHAPE.width):
        for j in range(3):
            assert A[j, i].item() == pytest.approx(1 / math.sqrt(3 * SHAPE.width) if i % 3 == j else 0, rel=1e-6)
    assert (A @ A.T - torch.diag(A.pow(2).sum(1))).abs().max() == 0


@pytest.mark.parametrize("bound", ["softmax", "sigmoid"])
def test_laurels_weights_stay_within_their_bound(bound):
    site = model_of(f"laurel_rw(bound={bound}, scale=3)", dtype=torch.float32).parts[2].sites["mlp"]
    x, y = torch.ones(1, 1, SHAPE.width), torch.zeros(1, 1, SHAPE.width)
    with torch.no_grad():
        site.logits.copy_(torch.tensor([-50.0, 50.0]))
    assert torch.equal(site.write((x,), None, x, y)[0], 3 * x)
    assert torch.equal(site.write((y,), None, x, x)[0].round(decimals=4), y)


@pytest.mark.parametrize("previous", [1, 2, 3, 9, 20])
def test_laurel_carries_what_is_read_and_no_more(previous):
    variant = ModelPlan(SHAPE, residual=f"laurel_pa(previous={previous})").residual_of(0)
    lengths = [len(variant.state_spec(index)) for index in range(2 * SHAPE.layers + 1)]
    assert lengths == [min(previous, index + 1) for index in range(2 * SHAPE.layers)] + [1]
    model = model_of(f"laurel_pa(previous={previous})")
    gammas = {name: p for name, p in canonical_parameters(model, model.prefixes).items() if name.endswith("gamma")}
    assert [len(gamma) for gamma in gammas.values()] == lengths[:-1]


def test_laurel_with_gamma_on_the_newest_alone_is_the_low_rank_version():
    previous, low_rank = model_of("laurel_pa(previous=3)"), model_of("laurel_lr")
    with torch.no_grad():
        for name, parameter in canonical_parameters(previous, previous.prefixes).items():
            if name.endswith("gamma"):
                parameter.zero_()[0] = 1
    torch.testing.assert_close(previous(IDX[:, :-1])[0], low_rank(IDX[:, :-1])[0], rtol=1e-12, atol=0)


def rewritten(spec: str, beta: float):
    """The state that a site is given and gives, its direction and its target, with beta pinned to a value."""
    model = model_of(spec)
    variant, site = model.plan.residual_of(0), model.parts[2].sites["mlp"]
    (entry,) = variant.state_spec(1)
    generator = torch.Generator().manual_seed(1)
    X, update = (torch.randn(2, 3, *s, generator=generator, dtype=torch.float64) for s in (entry.shape, (SHAPE.width,)))
    with torch.no_grad():
        site.rewrite.beta.weight.zero_()
        site.rewrite.beta.bias.fill_(math.log(beta / (2 - beta)))
    normed, context = site.enter((X,))
    (after,) = site.write((X,), context, normed, update)
    x = X if context is None else context
    as_matrix = (X.unsqueeze(-2), after.unsqueeze(-2)) if context is None else (X, after)
    return *as_matrix, update / update.norm(dim=-1, keepdim=True), site.rewrite.target(x, normed)


@pytest.mark.parametrize("spec", ["deep_delta", "deep_delta_expanded"])
def test_beta_one_replaces_what_the_state_holds_along_the_direction(spec):
    """k . X becomes v, and what is orthogonal to k stays (arXiv 2601.00417, section 2)."""
    X, after, k, v = rewritten(spec, beta=1.0)
    torch.testing.assert_close((after * k.unsqueeze(-2)).sum(-1), v, rtol=1e-8, atol=1e-9)

    def orthogonal(Z):
        return Z - (Z * k.unsqueeze(-2)).sum(-1, keepdim=True) * k.unsqueeze(-2)

    torch.testing.assert_close(orthogonal(after), orthogonal(X), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("spec", ["deep_delta", pytest.param("deep_delta_expanded", marks=pytest.mark.full)])
def test_beta_starts_around_one_spread_by_its_weights(spec):
    """w ~ N(0, 0.5 / sqrt(C)) makes N(0, 0.5) of a normed token: mean and deviation of 2 sigmoid of it, integrated."""
    z = torch.linspace(-5, 5, 10_001, dtype=torch.float64)
    density = torch.exp(-0.5 * (z / 0.5) ** 2)
    density /= density.sum()
    beta = 2 / (1 + torch.exp(-z))
    mean = (density * beta).sum().item()
    deviation = (density * (beta - mean) ** 2).sum().sqrt().item()
    assert mean == pytest.approx(1, abs=1e-9) and 0.2 < deviation < 0.25
    wide = SHAPE.model_copy(update={"width": 1024})
    normed = torch.randn(2000, wide.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for part in model_of(spec, wide, away=0).parts[2:-1]:
        for site in part.sites.values():
            found = 2 * torch.sigmoid(site.rewrite.beta(normed))
            assert found.mean().item() == pytest.approx(mean, abs=0.03)
            assert found.std().item() == pytest.approx(deviation, rel=0.1)


def test_no_output_is_no_rewrite():
    site = model_of("deep_delta", away=0).parts[2].sites["attention"]
    normed, x = torch.randn(2, 1, 1, SHAPE.width, dtype=torch.float64)
    (after,) = site.write((x,), None, normed, torch.zeros_like(x))
    assert torch.equal(after, x)


def test_value_channels_that_start_alike_come_apart_in_training():
    model = model_of("deep_delta_expanded", away=0, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    spread = []
    for _ in range(60):
        states = []
        handle = model.parts[-1].register_forward_pre_hook(lambda module, given: states.append(given[0][0]))
        loss = loss_of(model)
        handle.remove()
        X = states[0].detach()
        spread.append(((X - X.mean(-2, keepdim=True)).norm() / X.norm()).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    readout = model.parts[-1].readout.weight
    assert spread[0] > 1e-3 and spread[-1] > 1e-3
    assert (readout - readout.mean(0)).abs().max() > 1e-4


def test_matrices_that_project_the_stream_decay_and_coefficients_do_not():
    for spec, decaying in (
        ("laurel_rw", set()),
        ("laurel_lr", {"map.A.weight", "map.B.weight"}),
        ("laurel_pa", {"map.A.weight", "map.B.weight"}),
        ("deep_delta", {"rewrite.beta.weight", "rewrite.target.proj.weight"}),
        ("deep_delta_expanded", {"rewrite.beta.weight", "rewrite.target.proj.weight"}),
    ):
        model = model_of(spec)
        rules = canonical_rules(model, model.prefixes, model.plan)
        prefix = "layers.02.mlp.site."
        found = {name.removeprefix(prefix) for name, rule in rules.items() if name.startswith(prefix) and rule.decay}
        assert found == decaying, spec


@pytest.mark.parametrize(
    "spec, message",
    [
        ("laurel_rw(bound=tanh)", "bound=tanh is not valid"),
        ("laurel_rw(scale=0)", "scale=0 is not valid"),
        ("laurel_lr(rank=0)", "rank=0 is not valid"),
        ("laurel_pa(previous=0)", "previous=0 is not valid"),
        ("deep_delta_expanded(channels=1)", "channels=1 is not valid"),
        ("deep_delta + deep_delta_expanded", r"reads the state \(value_channels\[4, 32\]\)"),
    ],
)
def test_what_makes_no_sense_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        ModelPlan(SHAPE, residual=spec)
