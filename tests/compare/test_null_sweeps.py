"""Simulated sweeps through the whole comparison: how often it finds a difference that is not there, or one that is."""

import dataclasses

import numpy as np
import pytest
from made_sweeps import write_sweep

from megaresid.compare.comparison import compare_runs
from megaresid.compare.runs import Found, read_runs
from megaresid.compare.statistics import paired, power

SEEDS = 4
OF_SEED, OF_RUN = 0.003, 0.002
"""Standard deviations of what runs of one seed share, and of what each run has alone."""


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Found:
    """Two variants, one validation a run: what is simulated is its loss."""
    folder = write_sweep(
        tmp_path_factory.mktemp("null"), {"vanilla": [3.0] * SEEDS, "other": [3.0] * SEEDS}, steps=10, every=10
    )
    return read_runs([folder])


def simulated(template: Found, losses: dict[tuple[str, int], float]) -> Found:
    runs = []
    for run in template.runs:
        final = {"val_loss": losses[run.config["residual"], run.seed]}
        rows = [row | final if row["step"] == run.steps and "val_loss" in row else row for row in run.rows]
        runs.append(dataclasses.replace(run, rows=rows))
    return Found(tuple(runs), (), ())


def found_differences(template: Found, true: float, sweeps: int, seed: int) -> list:
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(sweeps):
        shared = generator.normal(0, OF_SEED, SEEDS)
        losses = {
            (name, seed): 3.0 + (name == "other") * true + shared[seed - 1] + generator.normal(0, OF_RUN)
            for name in ("vanilla", "other")
            for seed in range(1, SEEDS + 1)
        }
        _, other = compare_runs(simulated(template, losses)).variants
        expected = [losses["other", seed] - losses["vanilla", seed] for seed in range(1, SEEDS + 1)]
        assert other.difference.mean == pytest.approx(np.mean(expected), abs=1e-12)
        found.append(other.difference)
    return found


def losses_of(generator, true: float) -> tuple[np.ndarray, np.ndarray]:
    shared = generator.normal(0, OF_SEED, SEEDS)
    of_runs = generator.normal(0, OF_RUN, (2, SEEDS))
    return 3.0 + true + shared + of_runs[0], 3.0 + shared + of_runs[1]


def test_the_paired_test_finds_nothing_in_nineteen_of_twenty_null_sweeps():
    generator = np.random.default_rng(3)
    found = [paired(*losses_of(generator, 0.0)).p_t < 0.05 for _ in range(1000)]
    assert np.mean(found) == pytest.approx(0.05, abs=0.015)


@pytest.mark.full
def test_null_sweeps_are_taken_for_differences_in_one_of_twenty(template):
    found = found_differences(template, 0.0, 1000, seed=1)
    assert np.mean([one.p_t < 0.05 for one in found]) == pytest.approx(0.05, abs=0.015)
    assert np.mean([one.verdict == "not distinguishable" for one in found]) == pytest.approx(0.95, abs=0.015)
    assert np.mean([one.low < 0 < one.high for one in found]) == pytest.approx(0.95, abs=0.015)
    assert all(one.p_permutation >= 2 / 2**SEEDS for one in found)


@pytest.mark.full
def test_a_planted_difference_is_found_as_often_as_the_power_says(template):
    true, sweeps = 0.007, 400
    found = found_differences(template, true, sweeps, seed=2)
    predicted = power(true, OF_RUN * np.sqrt(2), SEEDS)
    assert 0.5 < predicted < 0.95
    worse = np.mean([one.verdict == "worse" for one in found])
    assert worse == pytest.approx(predicted, abs=3 * np.sqrt(predicted * (1 - predicted) / sweeps))
    assert not any(one.verdict == "better" for one in found)
