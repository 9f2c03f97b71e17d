"""Windows aligned with documents against plain loops over the tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaresid.data.aligned import AlignedStream
from megaresid.data.manifest import load_manifest
from megaresid.data.sampler import windows
from megaresid.data.shards import TokenStream

END = 50256


class Tokens:
    """As much of a TokenStream as is read here, from a list."""

    def __init__(self, tokens: list[int]):
        self.tokens = np.array(tokens, dtype=np.uint16)

    def __len__(self) -> int:
        return len(self.tokens)

    def read_into(self, start: int, tokens: np.ndarray) -> None:
        assert 0 <= start and start + len(tokens) <= len(self.tokens)
        tokens[:] = self.tokens[start : start + len(tokens)]


def starts_by_definition(tokens: list[int], context: int) -> list[int]:
    found = []
    for window in range((len(tokens) - 1) // context):
        start = window * context
        for position in range(window * context, (window + 1) * context):
            if tokens[position] == END:
                # The first document counts alone: if it does not fit, the window is the plain one.
                start = position if position + context + 1 <= len(tokens) else window * context
                break
        found.append(start)
    return found


@settings(deadline=None, max_examples=200)
@given(tokens=st.lists(st.sampled_from([1, 2, 3, END]), min_size=1, max_size=80), context=st.integers(1, 9))
def test_every_window_by_definition(tokens, context):
    stream = AlignedStream(Tokens(tokens), END)
    wanted = starts_by_definition(tokens, context)
    assert len(stream) == len(tokens) and windows(len(stream), context) == len(wanted)
    assert [stream.start(window, context) for window in range(len(wanted))] == wanted
    found = stream.read_windows(np.arange(len(wanted))[::-1], context)
    assert found.dtype == np.uint16
    assert found.tolist() == [tokens[start : start + context + 1] for start in wanted[::-1]]
    assert len(set(wanted)) == len(wanted), "two windows begin at one token"


def test_windows_begin_with_documents_and_the_last_stays_inside():
    tokens = [1, 1, END, 2, 2, 2, 2, 2, END, END, 3, 3, 3, 3, 3, 3, 3, END, 4, 4, 4]
    stream = AlignedStream(Tokens(tokens), END)
    assert [stream.start(window, 4) for window in range(5)] == [2, 4, 8, 12, 16]
    assert stream.read_windows(np.array([4, 0, 1]), 4).tolist() == [
        [3, END, 4, 4, 4],
        [END, 2, 2, 2, 2],
        [2, 2, 2, 2, END],
    ]


def test_places_and_reads_over_the_edges_of_shards(tmp_path, write_data_set):
    generator = np.random.default_rng(0)
    tokens = np.where(generator.random(200) < 0.1, END, np.arange(200)).tolist()
    cuts = {"train_000000.bin": tokens[:61], "train_000001.bin": tokens[61:62], "train_000002.bin": tokens[62:]}
    folder = write_data_set(tmp_path / "set", cuts)
    manifest = load_manifest(folder)
    plain = TokenStream.open(folder, manifest, "train")
    stream = AlignedStream(plain, manifest.content.tokenizer.end_of_text)
    starts = starts_by_definition(tokens, 7)
    read = stream.read_windows(np.arange(28), 7)
    assert read.tolist() == [tokens[start : start + 8] for start in starts]
    assert starts != [7 * window for window in range(28)]
    shards = [(folder / name, offset) for name, ids in cuts.items() for offset in range(len(ids))]
    for window in range(28):
        for column in range(8):
            assert stream.place(window, column, 7) == shards[starts[window] + column]


@pytest.mark.parametrize("length, share", [(1, 1.0), (4, 1.0), (8, 1.0), (5, None)])
def test_the_share_of_tokens_that_are_read_once(length, share):
    """Documents of one length: where it divides the context or is a multiple of it, nothing is read twice."""
    from megaresid.benchmark.loading import distinct

    tokens = [END if position % length == 0 else 1 for position in range(4 * 50 + 1)]
    stream = AlignedStream(Tokens(tokens), END)
    starts = starts_by_definition(tokens, 4)
    seen = {position for start in starts for position in range(start, start + 4)}
    assert distinct(stream, 4, 50) == len(seen) / 200
    assert share is None or distinct(stream, 4, 50) == share
    assert length != 5 or distinct(stream, 4, 50) < 1


def test_a_run_of_tokens_without_a_document_is_the_plain_stream():
    tokens = list(range(40))
    found = AlignedStream(Tokens(tokens), END).read_windows(np.arange(9), 4)
    assert found.tolist() == [tokens[4 * w : 4 * w + 5] for w in range(9)]
