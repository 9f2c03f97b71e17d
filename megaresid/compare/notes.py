"""What a comparison does and does not show, in words."""

from collections.abc import Iterator, Sequence

from megaresid.compare.differing import TIMING
from megaresid.compare.grouping import Choice
from megaresid.compare.metrics import left_out
from megaresid.compare.results import Budget, Differing, Variant
from megaresid.compare.runs import number


def notes_on(
    choices: Sequence[Choice],
    variants: Sequence[Variant],
    budget: Budget,
    differing: Sequence[Differing],
    spent: str | None,
    ranked: bool,
) -> Iterator[str]:
    """The baseline is the first of ``choices`` and of ``variants``, which stand in the same order."""
    if ranked:
        yield from _on_seeds(choices, variants)
    yield from _on_rates(choices)
    if ranked and len(variants) > 1:
        yield from _on_equal_cost(variants, budget, spent)
    yield from _on_cost(differing)
    yield from _on_metrics(choices, variants)
    yield from _on_skipped(choices)


def _on_seeds(choices: Sequence[Choice], variants: Sequence[Variant]) -> Iterator[str]:
    yield (
        "Intervals and p-values are over seeds: over initial weights and the order of the data. They say nothing of "
        "other data, another validation text, another size of model or a longer training."
    )
    counts = {len(variant.difference.seeds) for variant in variants if variant.difference}
    if counts and max(counts) < 2:
        yield "With one seed nothing can be said of noise: no difference here can be believed."
    elif counts:
        least = 2.0 ** (1 - max(counts))
        yield (
            f"With {max(counts)} seeds the permutation test's p cannot be below {min(1.0, least):.2g}; the t-test's "
            "can, where differences between seeds are normal, as it takes them to be. The verdicts follow the t-test "
            "after Holm's correction."
        )
    if any(variant.difference and variant.difference.verdict == "not distinguishable" for variant in variants):
        yield (
            "Not distinguishable does not mean equal: smaller true differences than the one that could have been shown "
            "may be there."
        )
    if any(variant.difference and variant.difference.detectable for variant in variants):
        tested = sum(variant.difference is not None for variant in variants)
        corrected = f", and before Holm's correction over {tested} variants, after which it takes more"
        yield (
            "Detectable is the true difference that a paired t-test at 5% finds 4 times in 5, if differences between "
            "seeds are spread as these few were: an estimate, as uncertain as that spread"
            f"{corrected if tested > 1 else ''}."
        )
    seeds = {choice.group.name: {run.seed for run in choice.runs} for choice in choices}
    baseline = seeds[choices[0].group.name]
    for name, mine in seeds.items():
        if alone := mine ^ baseline:
            listed = ", ".join(map(str, sorted(alone)))
            yield f"{name} and the baseline do not share the seeds {listed}: differences are of those that they share."
    for choice in choices:
        if choice.missing:
            listed = ", ".join(map(str, sorted(choice.missing)))
            yield f"{choice.group.name} is compared without the seeds {listed}, which have not come to their end."


def _on_rates(choices: Sequence[Choice]) -> Iterator[str]:
    counts = {choice.group.name: len(choice.group.rates()) for choice in choices}
    if max(counts.values()) > 1:
        yield (
            "Each variant stands at the learning rate of its lowest mean final loss, and is judged by the same losses: "
            "they are on the low side, of all variants alike where all had equally many rates."
        )
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        yield f"The variants had unequal numbers of learning rates ({listed}), which favours those that had more."


def _on_equal_cost(variants: Sequence[Variant], budget: Budget, spent: str | None) -> Iterator[str]:
    if spent:
        yield (
            f"The runs were given equal {spent}, not equal tokens: final losses are compared at that, and the curves' "
            "ends over tokens are not."
        )
    yield (
        "Losses at equal tokens, FLOPs and time are read off each run's curve at the least that any run spent in all, "
        "on a straight line between the two validations around it."
    )
    last = [curve.points[-1] for variant in variants for curve in variant.curves]
    if any(point.flops > 1.02 * budget.flops or point.seconds > 1.02 * budget.seconds for point in last):
        yield (
            "A loss in the middle of a run is not that of a run which was planned to end there, since its learning "
            "rate had not come down yet: at equal FLOPs or time the costlier variants look worse than they would if "
            "each had been trained for that budget. A sweep with that budget shows it."
        )


def _on_cost(differing: Sequence[Differing]) -> Iterator[str]:
    yield (
        "Tokens per second are the median over a run's rows of metrics, and time is that of training alone: evaluation "
        "and saving do not count. FLOPs are those of the model's definition, as in the table of variants."
    )
    if machines := [one.key for one in differing if one.key in TIMING]:
        yield (
            f"The runs differ in {', '.join(machines)}: tokens per second, step times and losses at equal time compare "
            "these too, not the variants alone."
        )


def _on_metrics(choices: Sequence[Choice], variants: Sequence[Variant]) -> Iterator[str]:
    if any(metric.difference for variant in variants for metric in variant.metrics):
        yield (
            "Perplexities and accuracies are beside the ranking, which is by validation loss alone. Their p-values are "
            "corrected over the variants and not over the many metrics: of 20 metrics one comes out by chance."
        )
    if names := left_out(run.measured_at_end() for choice in choices for run in choice.runs):
        yield f"Not compared, since it is not known whether lower or higher is better: {', '.join(names)}."


def _on_skipped(choices: Sequence[Choice]) -> Iterator[str]:
    for choice in choices:
        for run in choice.runs:
            skipped = max((number(row, "skipped_steps") or 0 for row in run.rows), default=0)
            if skipped:
                yield f"Of {run.name}, {skipped:,.0f} of {run.steps:,} updates were skipped by its health guard."
