"""Blending against its definition: exact shares, each folder without replacement, a pure function of the sample."""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaresid.data.blend import BLOCK, Blend, BlendedSampler, shares
from megaresid.data.sampler import Sampler, permute, sample_indices
from megaresid.errors import UserError

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
ORDERS = ("shuffled", "sequential")


def test_shares_are_exact_and_of_the_decimals_that_were_written():
    assert shares([0.7, 0.3]) == shares([7, 3]) == shares([70.0, 30.0]) == (Fraction(7, 10), Fraction(3, 10))
    assert shares([0.1] * 10) == (Fraction(1, 10),) * 10
    assert shares([1e-3, 0.999]) == (Fraction(1, 1000), Fraction(999, 1000))
    assert shares([2**30 - 1, 1])[1] == Fraction(1, 2**30)


@pytest.mark.parametrize(
    "weights, says",
    [
        ([0.5, 0], "--data-weights 0: must be above 0"),
        ([0.5, -1.0], "--data-weights -1.0: must be above 0"),
        ([float("nan"), 1], "--data-weights nan"),
        ([float("inf"), 1], "--data-weights inf"),
        ([1e-300, 1], "--data-weights 1e-300 1: the least is"),
    ],
)
def test_weights_that_make_no_sense(weights, says):
    with pytest.raises(UserError, match=says):
        shares(weights)


def by_definition(parts: tuple[Fraction, ...], seed: int, order: str, samples: int) -> list[tuple[int, int]]:
    """(folder, how many of it came before) by plain loops. In a shuffled block, which samples of a folder come first
    is up to the permutation: the j-th slot of its range is its j-th sample of the block."""
    block = ceil(1 / min(parts))
    if order == "shuffled":
        block = max(1024, block)
    found, number, seen = [], 0, [0] * len(parts)
    while len(found) < samples:
        slots = []
        for folder in range(len(parts)):
            up_to, below = sum(parts[: folder + 1]), sum(parts[:folder])
            count = [floor(b * block * up_to) - floor(b * block * below) for b in (number, number + 1)]
            slots += [(folder, seen[folder] + j) for j in range(count[1] - count[0])]
        for folder, _ in slots:
            seen[folder] += 1
        places = range(block)
        if order == "shuffled":
            places = permute(np.arange(block), block, (seed, -1, number)).tolist()
        found += [slots[place] for place in places]
        number += 1
    return found[:samples]


@pytest.mark.parametrize("order", ORDERS)
@settings(deadline=None, max_examples=30)
@given(weights=WEIGHTS, seed=st.integers(0, 2**40))
def test_every_sample_by_plain_loops(order, weights, seed):
    parts = shares(weights)
    folders, own = Blend(parts, seed, order).assign(np.arange(2500))
    assert folders.dtype == own.dtype == np.int64
    assert list(zip(folders.tolist(), own.tolist())) == by_definition(parts, seed, order, 2500)


@pytest.mark.parametrize("order", ORDERS)
@settings(deadline=None, max_examples=50)
@given(weights=st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=8), first=st.integers(0, 10**12))
def test_shares_are_kept_within_one_sample_at_every_end_of_a_block(order, weights, first):
    """From any block on: samples of a folder before it are its least sample there, as none is left out."""
    parts = shares(weights)
    blend = Blend(parts, 5, order)
    folders, own = blend.assign(np.arange(first * blend.block, (first + 2) * blend.block))
    for folder, part in enumerate(parts):
        mine = own[folders == folder]
        counts = [int((folders[: n * blend.block] == folder).sum()) for n in (1, 2)]
        assert counts[0] >= 0 and len(mine) == counts[1]
        if not len(mine):
            continue
        start = int(mine.min())
        for n, count in enumerate([0, *counts]):
            assert abs(start + count - (first + n) * blend.block * part) < 1
        assert sorted(mine.tolist()) == list(range(start, start + len(mine)))
        if order == "sequential":
            assert mine.tolist() == sorted(mine.tolist())


def test_a_block_holds_all_folders_from_the_smallest_share_on():
    parts = shares([5000, 1])
    assert Blend(parts, 0, "shuffled").block == Blend(parts, 0, "sequential").block == 5001
    assert Blend(shares([3, 1]), 0, "shuffled").block == BLOCK
    assert Blend(shares([3, 1]), 0, "sequential").block == 4
    folders, _ = Blend(parts, 0, "shuffled").assign(np.arange(3 * 5001))
    assert (folders.reshape(3, -1) == 1).sum(axis=1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("order", ORDERS)
def test_a_sample_alone_is_what_it_is_among_others(order):
    sampler = BlendedSampler([100, 37, 50], shares([5, 2, 3]), 9, order)
    whole = sampler.window_of(np.arange(4000))
    some = np.random.default_rng(0).integers(0, 4000, (7, 30))
    assert np.array_equal(sampler.window_of(some), whole[some])
    assert all(sampler.window_of(np.array([s])).tolist() == [whole[s]] for s in (0, 1, 1023, 1024, 3999))


def test_each_folder_has_its_own_epochs_without_replacement():
    sizes, parts = [100, 37, 50], shares([5, 2, 3])
    starts = [0, 100, 137]
    windows = BlendedSampler(sizes, parts, 9, "shuffled").window_of(np.arange(10 * 1024))
    folders, own = Blend(parts, 9, "shuffled").assign(np.arange(10 * 1024))
    for folder, (start, size) in enumerate(zip(starts, sizes)):
        mine = folders == folder
        assert ((windows >= start) & (windows < start + size)).tolist() == mine.tolist()
        ordered = (windows[mine] - start)[np.argsort(own[mine])]
        epochs = [ordered[at : at + size].tolist() for at in range(0, len(ordered) - size + 1, size)]
        assert len(epochs) > 20
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        assert ordered.tolist() == Sampler(size, 9, folder=folder).window_of(np.arange(len(ordered))).tolist()


def test_sequential_folders_are_read_from_front_to_back_again_and_again():
    windows = BlendedSampler([10, 4], shares([2, 1]), 9, "sequential").window_of(np.arange(60))
    assert [w for w in windows.tolist() if w < 10] == [*range(10)] * 4
    assert [w - 10 for w in windows.tolist() if w >= 10] == [*range(4)] * 5
    assert windows[:6].tolist() == [0, 1, 10, 2, 3, 11]


def test_folders_of_one_size_and_other_seeds_have_orders_of_their_own():
    windows = BlendedSampler([500, 500], shares([1, 1]), 9, "shuffled").window_of(np.arange(1000))
    first, second = (windows[(windows >= 500) == side] % 500 for side in (False, True))
    shared = min(len(first), len(second))
    assert (first[:shared] == second[:shared]).mean() < 0.05
    other = BlendedSampler([500, 500], shares([1, 1]), 10, "shuffled").window_of(np.arange(1000))
    assert ((other >= 500) == (windows >= 500)).mean() < 0.6 and (other == windows).mean() < 0.05


@pytest.mark.parametrize("ranks, micro_batch", [(1, 24), (2, 3), (3, 4), (24, 1)])
def test_a_step_is_the_same_on_any_number_of_ranks(ranks, micro_batch):
    sampler = BlendedSampler([100, 37], shares([3, 2]), 1, "shuffled")
    for step in (0, 42, 43):
        found = []
        for a in range(24 // (ranks * micro_batch)):
            for rank in range(ranks):
                sizes = {"global_batch": 24, "ranks": ranks, "micro_batch": micro_batch}
                found += sampler.window_of(sample_indices(step, a, rank, **sizes)).tolist()
        assert found == sampler.window_of(np.arange(24 * step, 24 * step + 24)).tolist()
