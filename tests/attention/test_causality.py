"""What a token does reaches nothing before it and nothing in another document, bit for bit."""

import pytest
import torch
from mixer_models import LENGTH, SEGMENT, Mixers, inputs
from mixer_table import FAMILY_HEADS, ROWS


def changed(x, tokens):
    """Every number of ``tokens`` (a mask [B, T]) is another."""
    return torch.where(tokens[..., None], x.roll(1, -1) + 1, x)


def outputs(mixers, x, segment=None):
    with torch.inference_mode():
        return mixers(x, segment)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_later_tokens_change_no_output_before_them(row, dtype):
    """Every number of tokens t and later is changed, for every t; and the output at t does change."""
    mixers, x = Mixers(row, dtype=dtype), inputs(row).to(dtype)
    before = outputs(mixers, x)
    for t in range(LENGTH):
        after = outputs(mixers, changed(x, (torch.arange(LENGTH) >= t).expand(len(x), -1)))
        assert torch.equal(after[:, :t], before[:, :t]), t
        assert not torch.equal(after[:, t], before[:, t]), t


@pytest.mark.parametrize("row", FAMILY_HEADS, ids=str)
def test_the_same_past_a_chunk(row):
    length = 131
    mixers, x = Mixers(row), inputs(row, length, batch=1)
    before = outputs(mixers, x)
    for t in (63, 64, 65, 128, 130):
        after = outputs(mixers, changed(x, (torch.arange(length) >= t)[None]))
        assert torch.equal(after[:, :t], before[:, :t]), t
        assert not torch.equal(after[:, t], before[:, t]), t


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_document_changes_no_other(row):
    """Not the ones after it either; in itself it does, up to its last token."""
    mixers, x = Mixers(row, documents=True), inputs(row)
    before = outputs(mixers, x, SEGMENT)
    for document in range(7):
        here = SEGMENT == document
        after = outputs(mixers, changed(x, here), SEGMENT)
        assert torch.equal(after[~here], before[~here]), document
        assert (after[here] != before[here]).any(-1).all(), document


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_one_document_is_no_documents(row):
    x = inputs(row)
    one = torch.full(x.shape[:2], 7, dtype=torch.int32)
    assert torch.allclose(outputs(Mixers(row, True), x, one), outputs(Mixers(row), x), rtol=0, atol=1e-12)
