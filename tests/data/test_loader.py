import gc
import threading

import numpy as np
import pytest
import torch

from megaresid.data import loader as loader_module
from megaresid.data.loader import Loader, read_batch
from megaresid.data.manifest import load_manifest
from megaresid.data.sampler import Sampler, windows
from megaresid.data.shards import TokenStream
from megaresid.errors import UserError

CONTEXT, GLOBAL_BATCH = 7, 12
TOKENS = np.random.default_rng(0).integers(0, 50257, 1000).tolist()


@pytest.fixture
def make(tmp_path, write_data_set):
    """Loaders over three shards of unequal size that hold ``tokens``."""

    def make(tokens=TOKENS, **options):
        cuts = {"train_000000.bin": tokens[:300], "train_000001.bin": tokens[300:301], "train_000002.bin": tokens[301:]}
        # Each in a folder of its own: the threads of earlier loaders may still read theirs.
        folder = write_data_set(tmp_path / f"set{len(list(tmp_path.iterdir()))}", cuts)
        stream = TokenStream.open(folder, load_manifest(folder), "train")
        sampler = Sampler(windows(len(stream), CONTEXT), seed=3)
        defaults = dict(global_batch=GLOBAL_BATCH, micro_batch=2, ranks=1, rank=0, vocab_size=50257, last_step=40)
        return Loader(stream, sampler, context=CONTEXT, **defaults | options)

    return make


def expected(samples):
    """By definition: global sample s is the window the sampler gives; targets are the next tokens."""
    for window in Sampler((len(TOKENS) - 1) // CONTEXT, seed=3).window_of(np.array(samples)).tolist():
        start = window * CONTEXT
        yield TOKENS[start : start + CONTEXT], TOKENS[start + 1 : start + CONTEXT + 1]


@pytest.mark.parametrize("ranks, micro_batch", [(1, 2), (1, 12), (2, 3), (3, 1)])
def test_batches_by_definition_over_several_epochs(make, ranks, micro_batch):
    for rank in range(ranks):
        with make(ranks=ranks, rank=rank, micro_batch=micro_batch) as loader:
            batches = list(loader)
        accumulation = GLOBAL_BATCH // (ranks * micro_batch)
        assert len(batches) == 40 * accumulation
        for number, (idx, targets) in enumerate(batches):
            step, a = divmod(number, accumulation)
            first = step * GLOBAL_BATCH + a * ranks * micro_batch + rank * micro_batch
            wanted = list(expected(range(first, first + micro_batch)))
            assert idx.dtype == targets.dtype == torch.int64
            assert idx.is_contiguous() and targets.is_contiguous()
            assert list(zip(idx.tolist(), targets.tolist(), strict=True)) == wanted


def test_starting_later_gives_the_rest(make):
    with make() as whole, make(first_step=17) as rest:
        tail = list(whole)[17 * 6 :]
        for (a, b), (c, d) in zip(tail, rest, strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)


def test_many_steps_are_the_same_as_few(make):
    """The block of samples that are permuted at once must not show."""
    with make(last_step=300) as loader:
        idx = torch.cat([idx for idx, _ in loader])
    assert idx.tolist() == [inputs for inputs, _ in expected(range(300 * GLOBAL_BATCH))]


def test_an_end_is_final(make):
    with make(first_step=39) as loader:
        assert len(list(loader)) == 6
        assert list(loader) == []
    with make(first_step=40) as empty:
        assert list(empty) == []


def test_an_id_outside_the_vocabulary_names_its_place(make):
    tokens = [token % 500 for token in TOKENS]
    tokens[310] = 600
    window = 310 // CONTEXT
    order = Sampler((len(TOKENS) - 1) // CONTEXT, seed=3).window_of(np.arange(142)).tolist()
    with make(tokens, vocab_size=600, micro_batch=1) as loader:
        for _ in range(order.index(window)):
            next(loader)
        message = r"train_000002\.bin: token 9 is id 600, outside the vocabulary of 600"
        with pytest.raises(UserError, match=message) as caught:
            next(loader)
        assert caught.value.rank_local
        assert not loader._thread.is_alive()
        assert list(loader) == []
    with make(tokens, vocab_size=601) as loader:
        assert len(list(loader)) == 240


def test_a_target_outside_the_vocabulary_is_seen_too(make):
    tokens = [token % 500 for token in TOKENS]
    tokens[CONTEXT * 142] = 600
    with make(tokens, vocab_size=600) as loader:
        with pytest.raises(UserError, match=f"token {CONTEXT * 142 - 301} is id 600"):
            list(loader)


def test_close_ends_the_thread_in_the_middle(make):
    loader = make()
    next(loader)
    loader.close()
    assert not loader._thread.is_alive()
    assert list(loader) == []
    loader.close()


def test_dropping_the_loader_ends_the_thread(make):
    loader = make()
    next(loader)
    thread = loader._thread
    del loader
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_reads_ahead_but_not_without_bound(make, monkeypatch):
    """Four groups of three micro-batches of 2 x 7 tokens wait, and a fifth is in the thread's hands."""
    monkeypatch.setattr(loader_module, "TOKENS_AT_ONCE", 3 * 2 * CONTEXT)
    read, fifth = [], threading.Event()

    def counted(*options):
        read.append(0)
        if len(read) == 5:
            fifth.set()
        return read_batch(*options)

    monkeypatch.setattr(loader_module, "read_batch", counted)
    loader = make()
    assert fifth.wait(timeout=10)
    loader.close()
    assert len(read) == 5 and loader._ready.qsize() == loader._ready.maxsize == 4


@pytest.mark.parametrize("tokens_at_once", [1, 2 * CONTEXT, 5 * 2 * CONTEXT, 2**17])
def test_groups_do_not_show(make, monkeypatch, tokens_at_once):
    """Of 240 micro-batches, in groups of 1, 1, 5 and all of a block; also where one of them cannot be read."""
    monkeypatch.setattr(loader_module, "TOKENS_AT_ONCE", tokens_at_once)
    with make() as loader:
        batches = list(loader)
    found = [row for idx, _ in batches for row in idx.tolist()]
    assert len(batches) == 240 and found == [inputs for inputs, _ in expected(range(480))]
    assert all(idx.is_contiguous() and targets.is_contiguous() for idx, targets in batches)

    tokens = [token % 500 for token in TOKENS]
    tokens[310] = 600
    order = Sampler((len(TOKENS) - 1) // CONTEXT, seed=3).window_of(np.arange(142)).tolist()
    with make(tokens, vocab_size=600) as loader:
        seen = []
        with pytest.raises(UserError, match="token 9 is id 600"):
            for batch in loader:
                seen.append(batch)
    # Token 310 is the third input of its window, and the last target of none.
    assert len(seen) == order.index(310 // CONTEXT) // 2


@pytest.mark.parametrize("ranks, micro_batch", [(1, 5), (5, 1), (1, 24)])
def test_a_global_batch_that_does_not_divide(make, ranks, micro_batch):
    with pytest.raises(UserError, match="global batch 12 is not a multiple of"):
        make(ranks=ranks, micro_batch=micro_batch)
