"""How far seeds alone move the final loss, and how many of them a given difference needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaresid.compare.comparison import sound_runs
from megaresid.compare.results import Problem
from megaresid.compare.runs import read_runs
from megaresid.compare.statistics import detectable, seeds_needed, spread_interval
from megaresid.errors import UserError

DIFFERENCES = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
"""Nats per token."""


@dataclass(frozen=True)
class Spread:
    """A standard deviation with its degrees of freedom and its 95% interval."""

    value: float
    freedom: int
    low: float
    high: float


@dataclass(frozen=True)
class OfVariant:
    """The final losses of one variant at its best learning rate."""

    name: str
    learning_rate: float
    seeds: int
    mean: float
    spread: float


@dataclass(frozen=True)
class Noise:
    """``of_losses`` is the spread of final losses between seeds, pooled over the variants. ``of_differences`` is that
    of the difference of two variants trained with the same seeds, measured where there are several variants; with one
    it is sqrt(2) times the former, as if seeds moved two variants independently."""

    variants: tuple[OfVariant, ...]
    of_losses: Spread
    of_differences: Spread
    paired: bool
    """Whether ``of_differences`` was measured."""
    problems: tuple[Problem, ...]

    def needed(self, difference: float) -> tuple[int | None, int | None]:
        """Seeds that show it with 80% power: by the estimated spread, and by the upper end of its interval."""
        spread = self.of_differences
        return seeds_needed(difference, spread.value), seeds_needed(difference, spread.high)

    def shows(self, seeds: int) -> float:
        """The difference that so many seeds show with 80% power."""
        return detectable(self.of_differences.value, seeds)


def estimate_noise(paths: Sequence[Path]) -> Noise:
    """Raises UserError where no variant has two seeds that came to their end, and where seeds make no difference."""
    sound = sound_runs(read_runs(paths))
    choices = [choice for choice in sound.choices if len(choice.runs) > 1]
    if not choices:
        raise UserError("the noise between seeds needs two ended runs of one variant and learning rate: add seeds")
    losses = {choice.group.name: {run.seed: run.final.loss for run in choice.runs} for choice in choices}
    variants = tuple(
        OfVariant(choice.group.name, choice.rate, len(choice.runs), *_moments(losses[choice.group.name].values()))
        for choice in choices
    )
    of_losses = _pooled([list(of_seeds.values()) for of_seeds in losses.values()])
    if of_losses.value == 0:
        raise UserError("runs of different seeds have the same final losses: they are copies, or seeds do nothing")
    shared = sorted(set.intersection(*map(set, losses.values())))
    paired = len(losses) > 1 and len(shared) > 1
    if paired:
        rows = [[of_seeds[seed] for seed in shared] for of_seeds in losses.values()]
        of_differences = _of_differences(np.array(rows))
    else:
        of_differences = _scaled(of_losses, math.sqrt(2))
    return Noise(variants, of_losses, of_differences, paired, sound.problems)


def _moments(values) -> tuple[float, float]:
    values = list(values)
    return float(np.mean(values)), float(np.std(values, ddof=1))


def _pooled(groups: Sequence[Sequence[float]]) -> Spread:
    """Within groups, each around its own mean."""
    freedom = sum(len(group) - 1 for group in groups)
    return _spread(sum((len(group) - 1) * float(np.var(group, ddof=1)) for group in groups), freedom)


def _of_differences(losses: np.ndarray) -> Spread:
    """Of the difference of two variants of one seed, from losses [variants, seeds]: sqrt(2) times what is left of a
    loss when its variant's mean and its seed's mean have been taken away (two-way analysis of variance)."""
    rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    freedom = (losses.shape[0] - 1) * (losses.shape[1] - 1)
    return _scaled(_spread(float(np.sum(rest**2)), freedom), math.sqrt(2))


def _spread(squares: float, freedom: int) -> Spread:
    value = math.sqrt(squares / freedom)
    return Spread(value, freedom, *spread_interval(value, freedom))


def _scaled(spread: Spread, factor: float) -> Spread:
    return Spread(factor * spread.value, spread.freedom, factor * spread.low, factor * spread.high)
