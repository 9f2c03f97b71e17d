"""The statistics against scipy's, against definitions written out here, and against simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from megaresid.compare.statistics import (
    detectable,
    holm,
    interval,
    paired,
    power,
    seeds_needed,
    spread_interval,
)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(3.0, 0.01, shape)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8, 30])
@pytest.mark.parametrize("draws", range(5))
def test_intervals_and_p_values_are_scipys(seeds, draws):
    x, y = draw(draws, 2, seeds)
    found, test = paired(x, y), stats.ttest_rel(x, y)
    assert found.p_t == pytest.approx(test.pvalue, rel=1e-12)
    low, high = test.confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), rel=1e-9)
    assert found.interval.mean == pytest.approx(np.mean(x - y), rel=1e-12)
    alone = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (interval(x).low, interval(x).high) == pytest.approx((alone.low, alone.high), rel=1e-12)


@pytest.mark.parametrize("seeds", [2, 3, 6, 11])
def test_the_permutation_test_goes_through_every_sign_of_the_differences(seeds):
    for x, y in draw(seeds, 4, 2, seeds):
        differences = x - y
        means = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=seeds)]
        less = np.mean([mean <= np.mean(differences) + 1e-12 for mean in means])
        greater = np.mean([mean >= np.mean(differences) - 1e-12 for mean in means])
        assert paired(x, y).p_permutation == pytest.approx(min(1, 2 * min(less, greater)))


def test_the_least_p_of_three_seeds_by_permutation_is_a_quarter():
    assert paired([3.1, 3.2, 3.3], [4.1, 4.4, 4.2]).p_permutation == 0.25


def test_of_many_seeds_the_permutations_are_sampled_and_repeatable():
    x, y = draw(1, 2, 40)
    first = paired(x, y + 0.005).p_permutation
    assert first == paired(x, y + 0.005).p_permutation
    assert first == pytest.approx(stats.ttest_rel(x, y + 0.005).pvalue, abs=0.02)


def test_one_seed_allows_no_test():
    found = paired([3.1], [3.2])
    assert found.interval.mean == pytest.approx(-0.1)
    assert (found.interval.low, found.p_t, found.p_permutation, found.detectable) == (None, None, None, None)
    assert interval([3.1]).low is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seeds", [2, 3, 7])
def test_differences_without_spread_give_no_nan(seeds):
    same = list(draw(4, seeds))
    none = paired(same, same)
    assert (none.p_t, none.p_permutation, none.interval.low, none.interval.high) == (1.0, 1.0, 0.0, 0.0)
    # Rounding leaves these a hair apart.
    all_alike = paired([value + 0.1 for value in same], same)
    assert (all_alike.p_t, all_alike.interval.mean) == (0.0, pytest.approx(0.1))
    assert all_alike.p_permutation == pytest.approx(2 / 2**seeds) and all_alike.detectable == 0


def closed_testing(p_values):
    """Of each hypothesis, the largest Bonferroni p-value of all sets of hypotheses that it is in."""
    places = range(len(p_values))
    adjusted = []
    for place in places:
        sets = (s for size in places for s in itertools.combinations(places, size + 1) if place in s)
        adjusted.append(max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets))
    return adjusted


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 7])
def test_holm_is_closed_testing_with_bonferroni(count):
    generator = np.random.default_rng(count)
    for scale in (1.0, 0.1, 0.01):
        p_values = list(generator.uniform(0, scale, count))
        assert holm(p_values) == pytest.approx(closed_testing(p_values))
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3)


def power_by_integration(noncentrality, freedom):
    """Of T = (Z + d) / S, over the distribution of S, which is that of chi / sqrt(freedom)."""
    critical = stats.t.isf(0.025, freedom)

    def at(s):
        far = critical * s / math.sqrt(freedom)
        both = stats.norm.sf(far - noncentrality) + stats.norm.cdf(-far - noncentrality)
        return both * stats.chi.pdf(s, freedom)

    middle = math.sqrt(freedom)
    return integrate.quad(at, max(0, middle - 12), middle + 12, points=[middle], limit=200)[0]


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 100])
def test_power_is_that_of_the_noncentral_t(seeds):
    assert power(0, 0.01, seeds) == pytest.approx(0.05)
    for noncentrality in (0.3, 2.0, 8.0, 16.0, 40.0):
        difference = noncentrality * 0.01 / math.sqrt(seeds)
        expected = power_by_integration(noncentrality, seeds - 1)
        assert power(difference, 0.01, seeds) == pytest.approx(expected, abs=1e-8)
        assert power(-difference, 0.01, seeds) == power(difference, 0.01, seeds)
        upper = stats.nct.sf(stats.t.isf(0.025, seeds - 1), seeds - 1, noncentrality)
        assert power(difference, 0.01, seeds) == pytest.approx(upper, abs=0.02)
    assert power(1e9, 0.01, seeds) == 1


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 12, 1000])
def test_the_detectable_difference_is_found_four_times_in_five(seeds):
    smallest = detectable(0.004, seeds)
    assert power_by_integration(smallest * math.sqrt(seeds) / 0.004, seeds - 1) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("difference", [0.1, 0.02, 0.01, 0.005, 0.001])
def test_seeds_needed_are_the_fewest_with_that_power(difference):
    seeds = seeds_needed(difference, 0.01)
    assert seeds >= 2 and power(difference, 0.01, seeds) >= 0.8
    assert seeds == 2 or power(difference, 0.01, seeds - 1) < 0.8
    assert seeds_needed(1e-9, 0.01) is None
    # Of many seeds the normal approximation: n = (z_.975 + z_.8)^2 (sd / difference)^2.
    if seeds > 100:
        assert seeds == pytest.approx((1.959964 + 0.841621) ** 2 * (0.01 / difference) ** 2, rel=0.02)


def test_the_interval_of_a_spread_covers_it_as_often_as_it_says():
    samples = np.random.default_rng(7).normal(0, 2.0, (4000, 4))
    intervals = [spread_interval(spread, 3) for spread in np.std(samples, axis=1, ddof=1)]
    assert np.mean([low < 2.0 < high for low, high in intervals]) == pytest.approx(0.95, abs=0.012)


def test_the_detectable_difference_is_detected_that_often_in_simulation():
    """As a plan: with the true spread known, not each sample's own."""
    seeds, spread = 4, 0.005
    differences = np.random.default_rng(11).normal(detectable(spread, seeds), spread, (20_000, seeds))
    found = stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05
    assert np.mean(found) == pytest.approx(0.8, abs=0.01)
