"""The learning rate, against the curves drawn by hand."""

import math

import pytest

from megaresid.config import OptimizerOptions
from megaresid.training.schedule import learning_rate

PEAK, LEAST, STEPS = 2.0, 0.5, 100


def rates(**options) -> list[float]:
    chosen = OptimizerOptions(learning_rate=PEAK, min_learning_rate=LEAST, **options)
    return [learning_rate(step, STEPS, chosen) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_from_above_zero_to_the_peak(schedule):
    found = rates(schedule=schedule, warmup_fraction=0.1)
    assert found[:10] == pytest.approx([PEAK * k / 10 for k in range(1, 11)])
    assert max(found) == found[9] == PEAK


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_minimum():
    found = rates(schedule="cosine", warmup_fraction=0.2)
    assert found[59] == pytest.approx((PEAK + LEAST) / 2)  # 40 of the 80 steps after the warm-up
    assert found[39] == pytest.approx(LEAST + (PEAK - LEAST) * (1 + math.cos(math.pi / 4)) / 2)
    assert found[-1] == pytest.approx(LEAST)
    assert all(later < earlier for earlier, later in zip(found[20:], found[21:]))


def test_wsd_is_flat_and_then_decays_linearly():
    found = rates(schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2)
    assert found[10:80] == [PEAK] * 70
    assert found[80:] == pytest.approx([PEAK - (PEAK - LEAST) * k / 20 for k in range(1, 21)])


def test_constant_stays_at_the_peak_and_no_warm_up_means_none():
    assert rates(schedule="constant", warmup_fraction=0.0) == [PEAK] * STEPS


def test_a_run_that_is_all_warm_up_and_decay_stays_within_its_bounds():
    found = rates(schedule="wsd", warmup_fraction=0.6, decay_fraction=0.9)
    assert found[59] == PEAK and found[-1] == pytest.approx(LEAST)
