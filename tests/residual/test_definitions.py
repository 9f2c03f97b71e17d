"""Every variant equals its definition, away from initialisation, in fp64: logits and the gradient of every parameter."""

import pytest
import torch
from small_models import IDX, gradients_of, loss_of, model_of
from variant_models import logits_by_definition, loss_by_definition
from variant_table import ROWS

from megaresid.residual.stream import RESIDUALS
from megaresid.spec import parse_pattern


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_logits_and_gradients_equal_the_definition(row):
    model = model_of(row.spec, step=row.step)
    idx = IDX[:, :-1]
    assert relative_error(model(idx)[0], logits_by_definition(model, row.define, idx)) < 1e-10
    found = gradients_of(model, loss_of(model))
    expected = gradients_of(model, loss_by_definition(model, row.define))
    scale = max(gradient.norm().item() for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            # A gradient that is zero by symmetry (a key's bias) is rounding on both sides.
            error = (found[name] - gradient).norm().item()
            assert error < 1e-10 * max(gradient.norm().item(), 1e-6 * scale), name


def test_every_variant_has_a_row():
    named = {component.name for row in ROWS for _, component in parse_pattern(row.spec).terms}
    assert named == RESIDUALS.classes().keys()
