"""What seeds can show: intervals, paired tests, and their power. All of it is scipy's; Holm's steps alone are ours.

Every test is two-sided at 5%, every interval 95%, and power is asked to be 80%.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import optimize, stats

LEVEL, POWER = 0.05, 0.8
EXACT = 12
"""Up to so many seeds a permutation test goes through all 2^n ways of signing their differences."""
RESAMPLES = 2**EXACT
ROUNDING = 1e-13
"""Of the values: how far differences that are all the same may seem apart."""
MOST_SEEDS = 10_000
CERTAIN = 200.0
"""A noncentrality at which even a test of two pairs, whose critical value is 12.7, misses no difference."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval, which one value does not have."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Paired:
    """Of differences paired by seed: their interval, p-values, and the smallest difference that so many seeds show
    with 80% power given the spread of these. None where too few seeds allow none."""

    interval: Interval
    p_t: float | None
    p_permutation: float | None
    detectable: float | None


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, None, None)
    half = _critical(len(values) - 1) * float(stats.sem(values))
    return Interval(mean, mean - half, mean + half)


@cache
def _critical(freedom: int) -> float:
    """Of Student's t, two-sided."""
    return float(stats.t.isf(LEVEL / 2, freedom))


def paired(variant: Sequence[float], baseline: Sequence[float]) -> Paired:
    """``variant`` minus ``baseline``, of the same seeds in the same order.

    Differences without any spread are certain to the t-test: p is 0, or 1 where there is no difference.
    """
    differences = np.subtract(variant, baseline)
    count = len(differences)
    if count < 2:
        return Paired(Interval(float(np.mean(differences)), None, None), None, None, None)
    scale = max(np.max(np.abs(variant)), np.max(np.abs(baseline)))
    if np.ptp(differences) <= ROUNDING * scale:
        mean = float(np.mean(differences)) if np.max(np.abs(differences)) > ROUNDING * scale else 0.0
        signs = 1.0 if mean == 0 else min(1.0, 2.0 ** (1 - count))
        return Paired(Interval(mean, mean, mean), float(mean == 0), signs, 0.0)
    p_t = float(stats.ttest_rel(variant, baseline).pvalue)
    detected = detectable(float(np.std(differences, ddof=1)), count)
    return Paired(interval(differences), p_t, _permutation(variant, baseline), detected)


def _permutation(variant: Sequence[float], baseline: Sequence[float]) -> float:
    """Of the mean difference, where the null hypothesis is that each seed's two values could have been swapped."""
    found = stats.permutation_test(
        (variant, baseline),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): the smallest is multiplied by how many there are, the next by one less, and so
    on; none is smaller than one before it, nor above 1."""
    order = np.argsort(p_values, kind="stable")
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def power(difference: float, spread: float, seeds: int) -> float:
    """The probability that a paired t-test of ``seeds`` pairs shows a true ``difference``, where the differences of
    single pairs are normal with standard deviation ``spread``: by the noncentral t distribution."""
    return _power_at(abs(difference) * math.sqrt(seeds) / spread, seeds - 1)


def _power_at(noncentrality: float, freedom: int) -> float:
    """The square of a noncentral t is a noncentral F, whose tail scipy computes where ``nct`` gives NaN."""
    if noncentrality == 0:
        return LEVEL
    if noncentrality > CERTAIN:
        return 1.0
    return float(stats.ncf.sf(_critical(freedom) ** 2, 1, freedom, noncentrality**2))


def detectable(spread: float, seeds: int) -> float:
    """The difference that ``seeds`` pairs (at least 2) show with 80% power."""
    return _found_with_power(seeds - 1) * spread / math.sqrt(seeds)


@cache
def _found_with_power(freedom: int) -> float:
    """The noncentrality that is found with 80% power."""
    return optimize.brentq(lambda at: _power_at(at, freedom) - POWER, 0.0, CERTAIN)


def seeds_needed(difference: float, spread: float) -> int | None:
    """The fewest seeds that show ``difference`` with 80% power, at least 2; None where ``MOST_SEEDS`` do not."""
    if power(difference, spread, MOST_SEEDS) < POWER:
        return None
    few, enough = 1, MOST_SEEDS
    while enough - few > 1:
        middle = (few + enough) // 2
        if power(difference, spread, middle) >= POWER:
            enough = middle
        else:
            few = middle
    return enough


def spread_interval(spread: float, freedom: int) -> tuple[float, float]:
    """95% interval of a standard deviation of so many degrees of freedom (chi-squared)."""
    high, low = stats.chi2.ppf([LEVEL / 2, 1 - LEVEL / 2], freedom)
    return spread * math.sqrt(freedom / low), spread * math.sqrt(freedom / high)
