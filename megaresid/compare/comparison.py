"""Run directories in, a ``Comparison`` out: what a report says, before it is drawn."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaresid.compare import accounting
from megaresid.compare.differing import differences
from megaresid.compare.grouping import Choice, Group, best_rate, grouped, one_of_each, shared_seeds
from megaresid.compare.metrics import metric_names
from megaresid.compare.notes import notes_on
from megaresid.compare.results import (
    AtRate,
    Comparison,
    Difference,
    Differing,
    EqualCost,
    Estimate,
    Metric,
    Problem,
    Variant,
)
from megaresid.compare.runs import Found, Run, Unreadable, plain, read_runs
from megaresid.compare.statistics import LEVEL, Paired, holm, paired
from megaresid.errors import UserError, suggestion

VANILLA = {"residual": "vanilla", "attention": "softmax"}


@dataclass(frozen=True)
class Sound:
    """What can be compared: a variant each, at its best learning rate, with parameters and FLOPs per token by the hash
    of the layer specs."""

    choices: tuple[Choice, ...]
    counts: Mapping[str, tuple[int, int]]
    differing: tuple[Differing, ...]
    spent: str | None
    """What runs of unequal tokens have spent equally."""
    conflicts: tuple[str, ...]
    problems: tuple[Problem, ...]


def compare(paths: Sequence[Path], baseline: str | None = None, allow: str | None = None) -> Comparison:
    """Compare the runs at ``paths``, as ``compare_runs`` does. Raises UserError for a path that is no folder too."""
    return compare_runs(read_runs(paths), baseline, allow)


def compare_runs(found: Found, baseline: str | None = None, allow: str | None = None) -> Comparison:
    """Compare variants with the one named ``baseline``, by default that of vanilla residual connections.

    ``allow`` is the reason for which runs are ranked although they differ in what should be equal. Raises UserError for
    a baseline that is not there, and where no run can be counted.
    """
    sound = sound_runs(found)
    reference = _baseline(sound.choices, baseline)
    refusal = _refusal(sound, allow)
    ordered = sorted(sound.choices, key=lambda choice: (choice is not reference, _mean_loss(choice), choice.group.name))
    if refusal:
        ordered.sort(key=lambda choice: (choice is not reference, choice.group.name))
    variants = _variants(ordered, sound.counts, ranked=refusal is None)
    equal = {variant.name: variant.equal for variant in variants}
    spent = accounting.budget({variant.name: variant.curves for variant in variants})
    return Comparison(
        made=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        baseline=reference.group.name,
        variants=variants,
        orders=None if refusal else accounting.orders(equal),
        budget=None if refusal else spent,
        differing=sound.differing,
        problems=sound.problems,
        refusal=refusal,
        allowed=_allowed(sound, allow),
        notes=tuple(notes_on(ordered, variants, spent, sound.differing, sound.spent, refusal is None)),
    )


def sound_runs(found: Found) -> Sound:
    """What can be counted of what was found, and a line on everything else. Raises UserError where nothing can be."""
    problems = list(found.problems)
    runs, twice, conflicts = one_of_each(found.runs)
    counts: dict[str, tuple[int, int]] = {}
    kept: list[Run] = []
    for run in runs:
        try:
            if run.spec.hash not in counts:
                counts[run.spec.hash] = accounting.counts(run)
            kept.append(run)
        except Unreadable as problem:
            problems.append(Problem(run=run.name, line=plain(str(problem))))
    problems += [Problem(run=run.name, line=run.not_ended()) for run in kept if run.state != "ended"]
    choices = []
    for group in grouped(kept, found.planned):
        if choice := best_rate(group):
            choices.append(choice)
        else:
            problems.append(Problem(run=group.name, line=_not_ranked(group)))
    problems = sorted([*problems, *twice], key=lambda problem: problem.run)
    if not choices:
        told = "; ".join(f"{problem.run}: {problem.line}" for problem in problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"there is no run to compare: {told or 'the folders are empty'}{more}")
    ended = [run for choice in choices for run in choice.group.runs if run.state == "ended"]
    flops = {spec_hash: flops_per_token for spec_hash, (_, flops_per_token) in counts.items()}
    differing, spent = differences(ended, flops)
    return Sound(tuple(choices), counts, tuple(differing), spent, tuple(conflicts), tuple(problems))


def _not_ranked(group: Group) -> str:
    if any(run.state == "diverged" for run in group.runs):
        return "this variant is not ranked: at every learning rate some of its runs diverged"
    return "this variant is not ranked: none of its runs has come to its end"


def _baseline(choices: Sequence[Choice], name: str | None) -> Choice:
    names = {choice.group.name: choice for choice in choices}
    if name in names:
        return names[name]
    if name is not None:
        alike = [choice for choice in choices if any(run.config["residual"] == name for run in choice.runs)]
        if len(alike) == 1:
            return alike[0]
        raise UserError(f"--baseline {name}: no variant that can be compared has that name: {suggestion(name, names)}")
    if len(choices) == 1:
        return choices[0]
    plain = [
        choice
        for choice in choices
        if all(choice.runs[0].config[key] == value for key, value in VANILLA.items())
    ] or [choice for choice in choices if choice.runs[0].config["residual"] == VANILLA["residual"]]
    if len(plain) != 1:
        raise UserError(f"--baseline is missing: name the variant to compare with, one of {', '.join(sorted(names))}")
    return plain[0]


def _refusal(sound: Sound, allow: str | None) -> str | None:
    """Why the runs are not ranked; None where they may be, and where the user allowed it."""
    against = _against(sound)
    if not against or allow is not None:
        return None
    return f"The runs are not ranked: {'; '.join(against)}. To rank them all the same, say why: --allow REASON."


def _against(sound: Sound) -> list[str]:
    keys = [one.key for one in sound.differing if not one.comparable]
    return ([f"they differ in {', '.join(keys)}"] if keys else []) + list(sound.conflicts)


def _allowed(sound: Sound, allow: str | None) -> str | None:
    against = _against(sound)
    return f"{'; '.join(against)}. Ranked all the same, for this reason: {allow}" if against and allow else None


def _mean_loss(choice: Choice) -> float:
    return _final_loss(choice.runs).mean


def _final_loss(runs: Sequence[Run]) -> Estimate:
    return accounting.estimate((run, run.final.loss, run.steps) for run in runs)


def _variants(
    ordered: Sequence[Choice], counts: Mapping[str, tuple[int, int]], ranked: bool
) -> tuple[Variant, ...]:
    """The baseline is the first of ``ordered``."""
    curves = {
        choice.group.name: tuple(accounting.curve(run, counts[choice.group.spec_hash][1]) for run in choice.runs)
        for choice in ordered
    }
    spent = accounting.budget(curves)
    losses = {choice.group.name: {run.seed: run.final.loss for run in choice.runs} for choice in ordered}
    differences_ = _differences(ordered, losses, "lower") if ranked else {}
    metrics = _metrics(ordered, ranked)
    variants, baseline_step = [], None
    for choice in ordered:
        name, group = choice.group.name, choice.group
        cost = accounting.cost(choice.runs, *counts[group.spec_hash], baseline_step)
        baseline_step = baseline_step or cost.step_seconds.mean
        nothing = EqualCost(tokens=None, flops=None, seconds=None)
        variants.append(
            Variant(
                name=name,
                spec_hash=group.spec_hash,
                learning_rate=choice.rate,
                at_edge=choice.at_edge,
                rates=tuple(_at_rate(group, rate) for rate in group.rates()),
                loss=_final_loss(choice.runs),
                difference=differences_.get(name),
                metrics=metrics[name],
                cost=cost,
                equal=accounting.at_equal_cost(choice, curves[name], spent) if ranked else nothing,
                curves=curves[name],
            )
        )
    return tuple(variants)


def _at_rate(group: Group, rate: float) -> AtRate:
    ended = group.ended(rate)
    return AtRate(learning_rate=rate, loss=_final_loss(ended) if ended else None, diverged=group.diverged(rate))


def _differences(
    ordered: Sequence[Choice], values: Mapping[str, Mapping[int, float]], better: str
) -> dict[str, Difference]:
    """Of every variant but the first, to the first, by name. ``values`` are by name and seed."""
    reference = ordered[0]
    found: dict[str, tuple[list[int], Paired]] = {}
    for choice in ordered[1:]:
        mine, theirs = values[choice.group.name], values[reference.group.name]
        seeds = [seed for seed in shared_seeds(choice, reference) if seed in mine and seed in theirs]
        if seeds:
            found[choice.group.name] = seeds, paired([mine[s] for s in seeds], [theirs[s] for s in seeds])
    tested = [name for name, (_, one) in found.items() if one.p_t is not None]
    adjusted = dict(zip(tested, holm([found[name][1].p_t for name in tested])))
    return {
        name: Difference(
            mean=one.interval.mean,
            low=one.interval.low,
            high=one.interval.high,
            seeds=tuple(seeds),
            p_t=one.p_t,
            p_permutation=one.p_permutation,
            p_holm=adjusted.get(name),
            detectable=one.detectable,
            verdict=_verdict(one.interval.mean, adjusted.get(name), better),
        )
        for name, (seeds, one) in found.items()
    }


def _verdict(mean: float, p: float | None, better: str) -> str:
    if p is None:
        return "too few seeds"
    if p >= LEVEL:
        return "not distinguishable"
    return "better" if (mean < 0) == (better == "lower") else "worse"


def _metrics(ordered: Sequence[Choice], ranked: bool) -> dict[str, tuple[Metric, ...]]:
    """By variant; each number of its last step whose better direction is known."""
    measured = {choice.group.name: {run.seed: run.measured_at_end() for run in choice.runs} for choice in ordered}
    found: dict[str, list[Metric]] = {name: [] for name in measured}
    for metric, better in metric_names(one for of_seeds in measured.values() for one in of_seeds.values()):
        values = {
            name: {seed: one[metric] for seed, one in of_seeds.items() if metric in one}
            for name, of_seeds in measured.items()
        }
        compared = _differences(ordered, values, better) if ranked else {}
        for choice in ordered:
            name = choice.group.name
            samples = [(run, values[name][run.seed], run.steps) for run in choice.runs if run.seed in values[name]]
            if samples:
                estimate = accounting.estimate(samples)
                found[name].append(
                    Metric(name=metric, better=better, estimate=estimate, difference=compared.get(name))
                )
    return {name: tuple(metrics) for name, metrics in found.items()}
