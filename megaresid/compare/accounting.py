"""What training costs, and what it reaches at equal cost."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np

from megaresid.compare.grouping import Choice
from megaresid.compare.results import Budget, Cost, Curve, EqualCost, Estimate, Orders, Point, Sample, Source
from megaresid.compare.runs import SCHEMA, Run, Unreadable
from megaresid.compare.statistics import interval
from megaresid.errors import UserError

MEASURES = ("tokens", "flops", "seconds")
OF_MEANS = "Orders of means say nothing of noise."
WORDS = {"tokens": "tokens", "flops": "FLOPs", "seconds": "time"}


def estimate(samples: Iterable[tuple[Run, float, int]]) -> Estimate:
    """Of runs of different seeds, each with its value and the step that it stands at."""
    found = tuple(
        Sample(seed=run.seed, value=value, source=Source(run=run.name, step=step)) for run, value, step in samples
    )
    mean = interval([sample.value for sample in found])
    return Estimate(mean=mean.mean, low=mean.low, high=mean.high, samples=found)


def counts(run: Run) -> tuple[int, int]:
    """Parameters and FLOPs per token of training, of the count in the variants table. A run records them; of an earlier
    version's, which did not, they are counted again. Raises Unreadable where that cannot be done."""
    if run.spec.parameters is not None and run.spec.flops_per_token is not None:
        return run.spec.parameters, run.spec.flops_per_token
    from megaresid.config import from_flat
    from megaresid.model.count import parameters_by_component
    from megaresid.model.flops import training_flops_per_token
    from megaresid.users_code import mistakes_told, none_from

    values = {key: value for key, value in run.config.items() if key != "schema"}
    try:
        with none_from(run.path), mistakes_told():
            plan = from_flat(values, f"config.json (schema {SCHEMA})").plan()
            found = sum(parameters_by_component(plan).values()), training_flops_per_token(plan)
    except UserError as error:
        raise Unreadable(f"not counted: it does not say what it costs, and that cannot be counted: {error}") from None
    if plan.hash != run.spec.hash:
        raise Unreadable(
            "not counted: it does not say what it costs, and this version of megaresid makes another model of it"
        )
    return found


def cost(runs: Sequence[Run], parameters: int, flops_per_token: int, baseline_step: float | None) -> Cost:
    """Of a variant's runs. Speed and MFU are the median of a run's rows, in which evaluation and saving do not count;
    memory is the most. ``baseline_step`` is the mean step time to compare with, None for the baseline itself."""
    speeds = [float(np.median([value for value in run.values("tokens_per_second") if value > 0])) for run in runs]
    steps = estimate((run, run.tokens_per_step / speed, run.steps) for run, speed in zip(runs, speeds))
    mfu = [(run, float(np.median(values)), run.steps) for run in runs if (values := run.values("mfu"))]
    return Cost(
        parameters=parameters,
        flops_per_token=float(flops_per_token),
        tokens_per_second=estimate((run, speed, run.steps) for run, speed in zip(runs, speeds)),
        step_seconds=steps,
        step_ratio=1.0 if baseline_step is None else steps.mean / baseline_step,
        mfu=estimate(mfu) if len(mfu) == len(runs) else None,
        memory_bytes=estimate((run, max(run.values("memory_bytes")), run.steps) for run in runs),
    )


def curve(run: Run, flops_per_token: int) -> Curve:
    points = (
        Point(step=at.step, tokens=at.tokens, flops=at.tokens * flops_per_token, seconds=at.seconds, loss=at.loss)
        for at in run.validations
    )
    return Curve(run=run.name, seed=run.seed, points=tuple(points))


def budget(curves: Mapping[str, Sequence[Curve]]) -> Budget:
    """Of each measure, the least that any run has spent at its end."""
    last = [of_run.points[-1] for of_variant in curves.values() for of_run in of_variant]
    return Budget(**{measure: min(getattr(point, measure) for point in last) for measure in MEASURES})


def at_equal_cost(choice: Choice, curves: Sequence[Curve], spent: Budget) -> EqualCost:
    """A variant's losses at the budget, straight between the two validations around it; None of a measure where a
    run's first validation comes later. A loss's source is the validation at the budget, or the next after it."""
    found: dict[str, Estimate | None] = {}
    for measure in MEASURES:
        at, samples = getattr(spent, measure), []
        for run, of_run in zip(choice.runs, curves):
            spends = [getattr(point, measure) for point in of_run.points]
            if at < spends[0]:
                break
            loss = float(np.interp(at, spends, [point.loss for point in of_run.points]))
            samples.append((run, loss, of_run.points[int(np.searchsorted(spends, at))].step))
        found[measure] = estimate(samples) if len(samples) == len(choice.runs) else None
    return EqualCost(**found)


def orders(equal: Mapping[str, EqualCost]) -> Orders | None:
    """The variants' names from the lowest mean loss to the highest at equal tokens, FLOPs and time, and where these
    orders differ, in words. None of one variant, and where some variant has no loss there."""
    if len(equal) < 2 or any(getattr(costs, measure) is None for costs in equal.values() for measure in MEASURES):
        return None
    means = {
        measure: {name: getattr(costs, measure).mean for name, costs in equal.items()} for measure in MEASURES
    }
    ranked = {measure: tuple(sorted(equal, key=means[measure].__getitem__)) for measure in MEASURES}
    return Orders(**ranked, remark=_remark(ranked))


def _remark(ranked: Mapping[str, Sequence[str]]) -> str:
    if len(set(ranked.values())) == 1:
        return f"The order of the means is the same at equal tokens, equal FLOPs and equal time. {OF_MEANS}"
    lines = []
    for one, other in combinations(ranked["tokens"], 2):
        ahead = {measure: ranked[measure].index(one) < ranked[measure].index(other) for measure in MEASURES}
        behind = [WORDS[measure] for measure in MEASURES if not ahead[measure]]
        if behind:
            ahead_at = " and ".join(WORDS[measure] for measure in MEASURES if ahead[measure])
            lines.append(f"{one} is ahead of {other} at equal {ahead_at}, behind it at equal {' and '.join(behind)}")
    return f"The orders of the means differ: {'; '.join(lines)}. {OF_MEANS}"
