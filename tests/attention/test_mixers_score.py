"""Every mixer scores texts of every length, whatever else is in the batch: also those that do not fill its
chunks."""

import pytest
import torch
from mixer_models import shape_of
from mixer_table import FAMILY_HEADS, quick
from scored import assert_scores_every_length
from small_models import model_of


@pytest.mark.parametrize("row", quick(FAMILY_HEADS), ids=str)
def test_texts_of_every_length(row):
    model = model_of("vanilla", shape_of(row), attention=row.spec, away=row.away)
    assert_scores_every_length(model, 1e-8)
    assert_scores_every_length(model.to(torch.float32), 1e-3)
