"""Every residual variant scores texts of every length, whatever else is in the batch."""

import pytest
import torch
from scored import assert_scores_every_length
from small_models import model_of
from variant_table import FAMILY_HEADS, quick


@pytest.mark.parametrize("row", quick(FAMILY_HEADS), ids=str)
def test_texts_of_every_length(row):
    model = model_of(row.spec, step=row.step)
    assert_scores_every_length(model, 1e-9)
    assert_scores_every_length(model.to(torch.float32), 1e-3)
