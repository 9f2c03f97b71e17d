"""What every variant says of initialisation (``equals_vanilla``), and that none of its parameters is dead.

At GPT-2's initial values, in fp64, against vanilla with the same weights: what two models share has the same canonical
name and so the same value.
"""

from functools import cache

import pytest
import torch
from small_models import IDX, SHAPE, gradients_of, loss_of, model_of
from variant_table import ROWS

from megaresid.model.plan import ModelPlan

EXACT_SHAPE = SHAPE.model_copy(update={"norm_epsilon": 1e-12})


@cache
def logits_and_gradients(spec: str, shape, step: int):
    model = model_of(spec, shape, away=0, step=step)
    for module in model.modules():  # also of the norms whose epsilon does not come from the shape
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = shape.norm_epsilon
    return model(IDX[:, :-1])[0].detach(), gradients_of(model, loss_of(model))


def deviation(row, shape) -> tuple[float, float]:
    """Of the logits and, at worst, of the gradient of a weight that both have; relative to vanilla's."""
    logits, gradients = logits_and_gradients(row.spec, shape, row.step)
    expected_logits, expected_gradients = logits_and_gradients("vanilla", shape, 0)
    shared = gradients.keys() & expected_gradients.keys()
    assert len([name for name in shared if ".site." not in name]) >= 12 * SHAPE.layers + 2, "the sublayers are shared"
    scale = max(expected_gradients[name].norm().item() for name in shared)
    worst = 0.0
    for name in shared:
        wanted = expected_gradients[name]
        found_gradient = torch.zeros_like(wanted) if gradients[name] is None else gradients[name]
        # A gradient that is zero by symmetry (a key's bias) is rounding on both sides.
        error = (found_gradient - wanted).norm().item() / max(wanted.norm().item(), 1e-6 * scale)
        worst = max(worst, error)
    return ((logits - expected_logits).abs().max() / expected_logits.abs().max()).item(), worst


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_claim_about_initialisation_is_true(row):
    claim = ModelPlan(SHAPE, residual=row.spec).residual_of(0).equals_vanilla
    logits, gradients = deviation(row, SHAPE)
    if claim == "exactly":
        assert max(logits, gradients) < 1e-9
    elif claim == "up to epsilon":
        assert max(logits, gradients) > 1e-6, "the claim is too weak: it is exactly vanilla"
        assert max(deviation(row, EXACT_SHAPE)) < 1e-5
    else:
        assert claim == "no"
        assert logits > 1e-3


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_parameter_gets_a_gradient_within_two_steps(row):
    """Some start dead behind a zero; after two steps of AdamW every parameter has had a gradient that is not rounding."""
    model = model_of(row.spec, away=0, step=row.step)
    stepper = torch.optim.AdamW(model.parameters(), lr=1e-2)
    alive = set()
    for step in range(3):
        stepper.zero_grad()
        loss_of(model).backward()
        scale = max(p.grad.norm().item() for p in model.parameters() if p.grad is not None)
        named = model.named_parameters()
        # Rounding is 1e-16 of it; a query's true gradient is 1e-10 where a small stream meets no norm.
        alive |= {name for name, p in named if p.grad is not None and p.grad.norm().item() > 1e-12 * scale}
        stepper.step()
    dead = {name for name, _ in model.named_parameters()} - alive
    # A constant added to every score moves no softmax.
    assert {name for name in dead if not name.endswith("k_proj.bias")} == set()
