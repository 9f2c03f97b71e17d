"""A text given piece by piece with a cache is the text given at once."""

import pytest
import torch
from mixer_models import LENGTH, SEGMENT, Mixers, inputs
from mixer_table import FAMILY_HEADS, ROWS, ROWS_OF_ANY_LENGTH
from small_models import IDX, SHAPE, model_of

CUTS = {"token by token": (1,) * LENGTH, "in uneven pieces": (1, 4, 2, 1, 3), "a prompt, then tokens": (8, 1, 1, 1)}


def in_pieces(mixers, x, pieces, segment=None):
    caches = mixers.caches(x.shape[1])
    segments = (None,) * len(pieces) if segment is None else segment.split(pieces, 1)
    with torch.inference_mode():
        return torch.cat([mixers(*given, caches) for given in zip(x.split(pieces, 1), segments)], 1)


@pytest.mark.parametrize("segment", [None, SEGMENT], ids=["", "documents"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_pieces_are_the_whole(row, segment):
    """Every document of SEGMENT is cut somewhere, and begins with a piece somewhere."""
    mixers, x = Mixers(row, documents=segment is not None), inputs(row)
    whole = mixers(x, segment)
    for way, pieces in CUTS.items():
        found = in_pieces(mixers, x, pieces, segment)
        assert (found - whole).abs().max() < 1e-10 * whole.abs().max(), way


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("row", FAMILY_HEADS, ids=str)
def test_a_prompt_longer_than_a_chunk(row, documents):
    """Documents begin with a chunk, with a piece, and inside of both."""
    mixers, x = Mixers(row, documents), inputs(row, 141, batch=1)
    starts = torch.zeros(1, 141, dtype=torch.int32).index_fill_(1, torch.tensor([64, 67, 72, 100, 140]), 1)
    segment = starts.cumsum(1, dtype=torch.int32) if documents else None
    whole = mixers(x, segment)
    found = in_pieces(mixers, x, (70, 1, 1, 67, 1, 1), segment)
    assert (found - whole).abs().max() < 1e-10 * whole.abs().max()


@pytest.mark.parametrize("row", ROWS_OF_ANY_LENGTH, ids=str)
def test_what_is_carried_does_not_grow(row):
    """Between token 10 and token 40, and with the length that is announced."""
    mixers, x = Mixers(row), inputs(row, 40, batch=1)
    short, long = mixers.caches(40), mixers.caches(100_000)
    sizes = []
    with torch.inference_mode():
        for token in x.split(1, 1):
            assert torch.equal(mixers(token, None, short), mixers(token, None, long))
            sizes.append(sum(cache.bytes() for cache in short))
    assert 0 < sizes[9] == sizes[39] == sum(cache.bytes() for cache in long)


@pytest.mark.parametrize("row", [row for row in ROWS if row.grows], ids=str)
def test_keys_and_values_lie_in_place_from_the_first_token(row):
    """What grows with the text is allocated once."""
    mixers, x = Mixers(row), inputs(row, 5)
    caches, places = mixers.caches(5), set()
    for token in x.split(1, 1):
        mixers(token, None, caches)
        places.add(tuple(t.untyped_storage().data_ptr() for c in caches for t in c.tensors.values() if t.dim() > 1))
    assert len(places) == 1


def test_a_model_that_recomputes_its_layers_goes_on_from_a_cache_too():
    """Also where gradients are enabled, as they are by default."""
    model = model_of("vanilla", attention="gla + softmax", recompute=True)
    idx = IDX[:, : SHAPE.context]
    expected, _ = model(idx)
    cache = model.init_cache(SHAPE.context)
    found = torch.cat([model(piece, cache=cache)[0] for piece in idx.split(2, 1)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
