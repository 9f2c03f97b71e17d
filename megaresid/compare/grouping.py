"""Which runs are one variant, what it is called, and at which of its learning rates it is compared."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megaresid.compare.results import Problem
from megaresid.compare.runs import Planned, Run, plain

NAMING = (
    *("residual", "attention", "positions", "separate_documents", "model", "layers", "heads", "width", "context"),
    *("dropout", "activation"),
)
"""The options that the layer specs follow from."""


@dataclass(frozen=True)
class Group:
    """The runs of one model: of one hash of the layer specs. ``seeds`` are all that it was or is to be run with."""

    name: str
    spec_hash: str
    runs: tuple[Run, ...]
    seeds: frozenset[int]

    def rates(self) -> list[float]:
        return sorted({run.learning_rate for run in self.runs})

    def ended(self, rate: float) -> tuple[Run, ...]:
        """One of each seed that has ended, by seed."""
        found = (run for run in self.runs if run.learning_rate == rate and run.state == "ended")
        return tuple(sorted(found, key=lambda run: run.seed))

    def diverged(self, rate: float) -> int:
        return sum(run.learning_rate == rate and run.state == "diverged" for run in self.runs)


@dataclass(frozen=True)
class Choice:
    """A variant at its best learning rate, with the runs that count there."""

    group: Group
    rate: float
    runs: tuple[Run, ...]

    @property
    def at_edge(self) -> bool:
        rates = self.group.rates()
        return len(rates) > 1 and self.rate in (rates[0], rates[-1])

    @property
    def missing(self) -> frozenset[int]:
        """Seeds that have not come to their end at this rate."""
        return self.group.seeds - {run.seed for run in self.runs}


def grouped(runs: Sequence[Run], planned: Sequence[Planned]) -> list[Group]:
    """By the hash of the layer specs, in the order of their names."""
    by_hash: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_hash[run.spec.hash].append(run)
    names = variant_names(by_hash)
    groups = []
    for spec_hash, of_spec in by_hash.items():
        seeds = {run.seed for run in of_spec}
        written = [_naming(run.config) for run in of_spec]
        to_come = (one.config.get("seed") for one in planned if _naming(one.config) in written)
        seeds |= {seed for seed in to_come if type(seed) is int}
        groups.append(Group(names[spec_hash], spec_hash, tuple(of_spec), frozenset(seeds)))
    return sorted(groups, key=lambda group: group.name)


def _naming(config: Mapping[str, object]) -> list[object]:
    return [config.get(key) for key in NAMING]


def variant_names(by_hash: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """The shortest text that tells the variants apart, by hash: the options in which they differ, residual and
    attention as they were written, and the hash itself where no option does."""
    written = {
        spec_hash: {key: min({_text(run.config.get(key)) for run in runs}, key=lambda t: (len(t), t)) for key in NAMING}
        for spec_hash, runs in by_hash.items()
    }
    telling = [key for key in NAMING if len({options[key] for options in written.values()}) > 1] or ["residual"]
    names = {
        spec_hash: ", ".join(
            options[key] if key in ("residual", "attention") else f"{key}={options[key]}" for key in telling
        )
        for spec_hash, options in written.items()
    }
    taken = list(names.values())
    return {
        spec_hash: f"{name} [{spec_hash[:8]}]" if taken.count(name) > 1 else name for spec_hash, name in names.items()
    }


def _text(value: object) -> str:
    return plain(value) if isinstance(value, str) else str(value).lower()


def one_of_each(runs: Sequence[Run]) -> tuple[list[Run], list[Problem], list[str]]:
    """One ended run of each variant, learning rate and seed: the one that was started first. Choosing the last or the
    best would reward trying again.

    Returns the runs, a line for each that is left out, and those lines in which the losses differ, so that which run
    counts makes a difference.
    """
    kept: dict[tuple[str, float, int], Run] = {}
    others, problems, conflicts = [], [], []
    for run in sorted(runs, key=lambda run: (run.started, run.name)):
        if run.state != "ended":
            others.append(run)
            continue
        first = kept.setdefault((run.spec.hash, run.learning_rate, run.seed), run)
        if first is run:
            continue
        same = [(at.step, at.loss) for at in first.validations] == [(at.step, at.loss) for at in run.validations]
        what = "its losses are the same" if same else "its losses are others"
        line = f"not counted: {first.name} has the same variant, learning rate and seed, and was started first; {what}"
        problems.append(Problem(run=run.name, line=line))
        if not same:
            conflicts.append(f"{first.name} and {run.name} are of the same variant, learning rate and seed")
    counted = {id(run) for run in (*kept.values(), *others)}
    return [run for run in runs if id(run) in counted], problems, conflicts


def best_rate(group: Group) -> Choice | None:
    """The learning rate of the lowest mean final loss, among those at which every seed has come to its end. Where there
    is none, among those at which no run diverged and the most seeds have ended. None where nothing is left."""
    ended = {rate: group.ended(rate) for rate in group.rates()}
    whole = [rate for rate in ended if {run.seed for run in ended[rate]} == group.seeds]
    if not whole:
        sound = [rate for rate in ended if ended[rate] and not group.diverged(rate)]
        most = max((len(ended[rate]) for rate in sound), default=0)
        whole = [rate for rate in sound if len(ended[rate]) == most]
    if not whole:
        return None
    best = min(whole, key=lambda rate: np.mean([run.final.loss for run in ended[rate]]))
    return Choice(group, best, ended[best])


def shared_seeds(choice: Choice, baseline: Choice) -> list[int]:
    return sorted(_seeds(choice.runs) & _seeds(baseline.runs))


def _seeds(runs: Collection[Run]) -> set[int]:
    return {run.seed for run in runs}
