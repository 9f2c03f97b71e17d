import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from megaresid.data.sampler import Sampler, check_capacity, permute, sample_indices, windows
from megaresid.errors import UserError


@settings(deadline=None, max_examples=100)
@given(size=st.integers(1, 5000), key=st.tuples(st.integers(-(2**70), 2**70), st.integers(0, 2**40)))
def test_permute_is_a_bijection(size, key):
    result = permute(np.arange(size), size, key)
    assert result.dtype == np.int64
    assert sorted(result.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**20 - 1, 2**20, 2**20 + 1])
def test_permute_is_a_bijection_of_large_sets(size):
    result = permute(np.arange(size), size, (1, 0))
    assert np.array_equal(np.bincount(result, minlength=size), np.ones(size, dtype=np.int64))


def test_permute_acts_on_each_index_alone_and_keeps_the_shape():
    whole = permute(np.arange(1000), 1000, (3, 4))
    some = np.array([[999, 0, 5], [5, 17, 500]])
    assert np.array_equal(permute(some, 1000, (3, 4)), whole[some])
    assert some.tolist() == [[999, 0, 5], [5, 17, 500]]
    assert 0 <= permute(np.array([2**45 + 3]), 2**45 + 4, (0, 0))[0] < 2**45 + 4


def test_permute_refuses_indices_outside():
    for index in ([-1], [10]):
        with pytest.raises(IndexError):
            permute(np.array(index), 10, (0, 0))


@pytest.mark.parametrize("size", [2, 3, 5, 13, 16])
def test_every_index_goes_everywhere_equally_often(size):
    """Counts of (index, place) over N keys: for uniform permutations, (n-1)/n times Pearson's statistic is
    chi-squared with (n-1)^2 degrees of freedom, as the permutation matrix has doubly fixed margins."""
    keys, index = 2000, np.arange(size)
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[index, permute(index, size, (key, 0))] += 1
    expected = keys / size
    statistic = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size
    assert statistic < chi2.isf(1e-4, (size - 1) ** 2)


def test_neighbours_epochs_and_seeds_are_uncorrelated():
    """Correlations of n random ranks have standard deviation 1/sqrt(n); five of them bound each, and both ways of
    being the same place (expected once, Poisson) happen at most ten times."""
    size = 10007
    index = np.arange(size)
    orders = [permute(index, size, key) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (2**63, 0))]
    bound = 5 / np.sqrt(size)
    for number, order in enumerate(orders):
        for lag in (1, 2, 64, 5000):
            assert abs(np.corrcoef(order, np.roll(order, lag))[0, 1]) < bound
        for other in (index, *orders[:number]):
            assert abs(np.corrcoef(order, other)[0, 1]) < bound
            assert (order == other).sum() <= 10


def test_windows_fit_with_their_last_target():
    for tokens in range(60):
        for context in (1, 2, 7):
            fit = [w for w in range(tokens + 1) if w * context + context + 1 <= tokens]
            assert windows(tokens, context) == len(fit)


def test_sampler_sees_each_window_once_an_epoch():
    sampler = Sampler(37, seed=5)
    order = sampler.window_of(np.arange(4 * 37)).reshape(4, 37)
    for epoch in order:
        assert sorted(epoch.tolist()) == list(range(37))
    assert len({tuple(epoch) for epoch in order.tolist()}) == 4
    for samples in ([36, 37], [147, 0, 73, 74], [5]):
        assert sampler.window_of(np.array(samples)).tolist() == order.reshape(-1)[samples].tolist()
    assert sampler.window_of(np.arange(37)).tolist() != Sampler(37, seed=6).window_of(np.arange(37)).tolist()


@settings(deadline=None)
@given(
    ranks=st.integers(1, 5), micro_batch=st.integers(1, 5), accumulation=st.integers(1, 5), step=st.integers(0, 10**9)
)
def test_the_samples_of_a_step_do_not_depend_on_ranks(ranks, micro_batch, accumulation, step):
    size = ranks * micro_batch * accumulation
    found = []
    for rank in range(ranks):
        for a in range(accumulation):
            part = sample_indices(step, a, rank, global_batch=size, ranks=ranks, micro_batch=micro_batch)
            first = step * size + a * ranks * micro_batch + rank * micro_batch
            assert part.tolist() == [first + j for j in range(micro_batch)]
            found += part.tolist()
    assert sorted(found) == list(range(step * size, (step + 1) * size))


def test_capacity():
    assert check_capacity(8 * 16 + 1, context=16, global_batch=8, where="data") == 8
    with pytest.raises(UserError, match=r"^data: 128 tokens give 7 sequences of 16, fewer than one global batch of 8"):
        check_capacity(8 * 16, context=16, global_batch=8, where="data")
