"""The tables of a report, as text in cells: HTML and Markdown show the same ones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megaresid.compare.results import Comparison, Difference, Estimate, Metric, Variant
from megaresid.compare.units import (
    BYTES,
    FLOPS,
    LOSS_PLACES,
    TIME,
    TOKENS,
    UNKNOWN,
    Unit,
    fixed,
    places_for,
    probability,
    rate,
    significant,
    unit_for,
)
from megaresid.compare.wording import amount, half_width, in_order, interval

NATS = "nats per token"
LISTED = 6  # runs of one value
HASH = 12  # characters of a hash that tell one from another


@dataclass(frozen=True)
class Cell:
    """``source`` tells which runs and steps the number came from, and shows when the cell is pointed at."""

    text: str
    number: bool = True
    source: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Table:
    """The first cell of a row names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def numbers(self) -> tuple[bool, ...]:
        """Whether a column is one of numbers, which stand to the right."""
        return tuple(all(row[index].number for row in self.rows) for index in range(len(self.columns)))


def word(text: str, source: str = "") -> Cell:
    return Cell(text, number=False, source=source)


def name_of(variant: Variant, comparison: Comparison) -> Cell:
    return word(f"{variant.name} (baseline)" if variant.name == comparison.baseline else variant.name)


def sources_of(estimate: Estimate) -> str:
    """Every seed's value, with the run and step that it came from."""
    return "; ".join(
        f"seed {sample.seed}: {sample.value:.6g} ({sample.source.run}, step {sample.source.step})"
        for sample in estimate.samples
    )


def mean(estimate: Estimate | None, places: int = LOSS_PLACES, factor: float = 1.0) -> Cell:
    if estimate is None:
        return Cell(UNKNOWN)
    return Cell(fixed(estimate.mean / factor, places), source=sources_of(estimate))


def final_loss(comparison: Comparison) -> Table:
    """Each variant at its best learning rate."""
    rows = [
        (
            name_of(variant, comparison),
            Cell(rate(variant.learning_rate) + (" (at the edge)" if variant.at_edge else "")),
            Cell(str(len(variant.loss.samples))),
            mean(variant.loss),
            Cell(interval(variant.loss, LOSS_PLACES)),
            word(variant.spec_hash[:HASH], source=variant.spec_hash),
        )
        for variant in in_order(comparison)
    ]
    columns = ("variant", "learning rate", "seeds", f"validation loss ({NATS})", "95% interval", "spec hash")
    return Table("Final validation loss, mean over seeds, at the best learning rate", columns, tuple(rows))


DIFFERENCE_COLUMNS = (
    "difference",
    "verdict",
    "95% interval",
    "p (paired\N{NO-BREAK SPACE}t)",
    "p (Holm)",
    "p (permutation)",
    "detectable",
)


def difference_cells(difference: Difference, places: int = LOSS_PLACES) -> tuple[Cell, ...]:
    return (
        Cell(fixed(difference.mean, places, signed=True), source=f"seeds {', '.join(map(str, difference.seeds))}"),
        Cell(difference.verdict, number=False, verdict=difference.verdict),
        Cell(interval(difference, places, signed=True)),
        Cell(probability(difference.p_t)),
        Cell(probability(difference.p_holm)),
        Cell(probability(difference.p_permutation)),
        Cell(fixed(difference.detectable, places)),
    )


def differences(comparison: Comparison) -> Table | None:
    """Of the final loss, to the baseline."""
    rows = [
        (
            word(variant.name),
            Cell(", ".join(map(str, variant.difference.seeds))),
            *difference_cells(variant.difference),
        )
        for variant in comparison.variants
        if variant.difference is not None
    ]
    if comparison.refusal is not None or not rows:
        return None
    caption = (
        f"Final validation loss minus that of {comparison.baseline}, paired by seed; negative is better. "
        "Detectable: about the smallest true difference that so many seeds show with 80% power at 5%"
    )
    return Table(caption, ("variant", "seeds", *DIFFERENCE_COLUMNS), tuple(rows))


def metrics(comparison: Comparison) -> list[Table]:
    """One for each number of the evaluations."""
    variants = in_order(comparison)
    names = dict.fromkeys(metric.name for variant in variants for metric in variant.metrics)
    return [_metric(comparison, name) for name in names]


def _metric(comparison: Comparison, name: str) -> Table:
    found = [(v, metric) for v in in_order(comparison) for metric in v.metrics if metric.name == name]
    ranked = comparison.refusal is None and any(metric.difference is not None for _, metric in found)
    columns = ("variant", "seeds", "mean", "95% interval", *(DIFFERENCE_COLUMNS if ranked else ()))
    rows = tuple((name_of(variant, comparison), *_metric_cells(metric, ranked)) for variant, metric in found)
    return Table(f"{name} ({found[0][1].better} is better)", columns, rows)


def _metric_cells(metric: Metric, ranked: bool) -> tuple[Cell, ...]:
    places = places_for(metric.estimate.mean)
    cells = (
        Cell(str(len(metric.estimate.samples))),
        mean(metric.estimate, places),
        Cell(interval(metric.estimate, places)),
    )
    if not ranked:
        return cells
    if metric.difference is None:
        return (*cells, Cell(""), word(""), *[Cell("")] * (len(DIFFERENCE_COLUMNS) - 2))
    return (*cells, *difference_cells(metric.difference, places))


def cost(comparison: Comparison) -> Table:
    """What each variant costs."""
    variants = in_order(comparison)
    flops = unit_for([v.cost.flops_per_token for v in variants], FLOPS)
    seconds = unit_for([v.cost.step_seconds.mean for v in variants], TIME)
    memory = unit_for([v.cost.memory_bytes.mean for v in variants], BYTES)
    columns = (
        "variant",
        "parameters",
        f"{flops.name} per token",
        "tokens per second",
        f"step time ({seconds.name})",
        "step time / baseline's",
        "MFU (%)",
        f"peak memory ({memory.name})",
    )
    rows = []
    for variant in variants:
        of = variant.cost
        rows.append(
            (
                name_of(variant, comparison),
                Cell(f"{of.parameters:,}"),
                Cell(significant(of.flops_per_token / flops.factor)),
                _significant(of.tokens_per_second, Unit(1, "")),
                _significant(of.step_seconds, seconds),
                Cell(fixed(of.step_ratio, 3)),
                _significant(of.mfu, Unit(0.01, "%")),
                _significant(of.memory_bytes, memory),
            )
        )
    caption = "Means over seeds and their 95% intervals. Tokens per second and step time exclude evaluation and saving"
    return Table(caption, columns, tuple(rows))


def _significant(estimate: Estimate | None, unit: Unit) -> Cell:
    if estimate is None:
        return Cell(UNKNOWN)
    half = half_width(estimate)
    about = "" if half is None else f" ± {significant(half / unit.factor, 2)}"
    return Cell(significant(estimate.mean / unit.factor) + about, source=sources_of(estimate))


def equal_cost(comparison: Comparison) -> Table | None:
    """Loss at equal tokens, FLOPs and time, with the place of each variant."""
    budget, orders = comparison.budget, comparison.orders
    if budget is None:
        return None
    kinds = (("tokens", TOKENS), ("flops", FLOPS), ("seconds", TIME))
    columns = ["variant"]
    for what, units in kinds:
        columns.append(f"loss at {amount(getattr(budget, what), units)}")
        columns += ["95% interval"] + (["place"] if orders else [])
    rows = []
    for variant in in_order(comparison):
        row = [name_of(variant, comparison)]
        for what, _ in kinds:
            estimate = getattr(variant.equal, what)
            row += [mean(estimate), Cell(interval(estimate, LOSS_PLACES) if estimate else UNKNOWN)]
            if orders:
                order = getattr(orders, what)
                row.append(Cell(str(order.index(variant.name) + 1) if variant.name in order else UNKNOWN))
        rows.append(tuple(row))
    caption = "Validation loss at what every variant has spent, interpolated along the curves"
    return Table(caption, tuple(columns), tuple(rows))


def learning_rates(comparison: Comparison) -> Table:
    """Every learning rate of every variant."""
    rows = [
        (
            name_of(variant, comparison),
            Cell(rate(at.learning_rate)),
            mean(at.loss),
            Cell(interval(at.loss, LOSS_PLACES) if at.loss else UNKNOWN),
            Cell(str(len(at.loss.samples)) if at.loss else "0"),
            Cell(str(at.diverged)),
            word("best" if at.learning_rate == variant.learning_rate and len(variant.rates) > 1 else ""),
        )
        for variant in in_order(comparison)
        for at in variant.rates
    ]
    columns = ("variant", "learning rate", f"validation loss ({NATS})", "95% interval", "seeds", "diverged", "")
    return Table("Final validation loss by learning rate, mean over seeds", columns, tuple(rows))


def differing(comparison: Comparison) -> Table | None:
    """What is not the same in all runs."""
    rows = [
        (word(key.key), word(value), Cell(str(len(runs))), word(_listed(runs)), word(_comparable(key.comparable)))
        for key in comparison.differing
        for value, runs in key.values
    ]
    columns = ("what", "value", "runs", "which", "may differ")
    caption = "Each value with its runs. What may not differ keeps the runs from being ranked, unless that was allowed"
    return Table(caption, columns, tuple(rows)) if rows else None


def _listed(runs: Sequence[str]) -> str:
    if len(runs) <= LISTED:
        return ", ".join(runs)
    return f"{', '.join(runs[: LISTED - 1])} and {len(runs) - LISTED + 1} more (all in report.json)"


def _comparable(comparable: bool) -> str:
    return "yes" if comparable else "no"


def problems(comparison: Comparison) -> Table | None:
    rows = tuple((word(problem.run), word(problem.line)) for problem in comparison.problems)
    return Table("Runs that could not be counted, or not wholly", ("run", "why"), rows) if rows else None


def sources(comparison: Comparison) -> list[Table]:
    """Of every variant: each seed's value of each number, with the run and step that it came from."""
    return [
        Table(
            f"Where the numbers of {variant.name} came from",
            ("number", "seed", "value", "run", "step"),
            tuple(_source_rows(variant)),
        )
        for variant in in_order(comparison)
    ]


def _source_rows(variant: Variant) -> Iterable[tuple[Cell, ...]]:
    for what, estimate in _estimates(variant):
        for sample in estimate.samples:
            yield (
                word(what),
                Cell(str(sample.seed)),
                Cell(f"{sample.value:.7g}"),
                word(sample.source.run),
                Cell(str(sample.source.step)),
            )


def _estimates(variant: Variant) -> Sequence[tuple[str, Estimate]]:
    of, equal = variant.cost, variant.equal
    named = [("final validation loss", variant.loss)]
    named += [(metric.name, metric.estimate) for metric in variant.metrics]
    named += [("tokens per second", of.tokens_per_second), ("step time (s)", of.step_seconds), ("MFU", of.mfu)]
    named += [("peak memory (bytes)", of.memory_bytes)]
    named += [(f"loss at equal {name}", getattr(equal, what)) for what, name in EQUAL.items()]
    named += [
        (f"final validation loss at learning rate {rate(at.learning_rate)}", at.loss)
        for at in variant.rates
        if len(variant.rates) > 1
    ]
    return [(what, estimate) for what, estimate in named if estimate is not None]


EQUAL = {"tokens": "tokens", "flops": "FLOPs", "seconds": "time"}


def points(comparison: Comparison) -> list[Table]:
    """Of every variant: every evaluation of every run."""
    tables = []
    for variant in in_order(comparison):
        rows = tuple(
            (
                word(curve.run),
                Cell(str(curve.seed)),
                Cell(str(point.step)),
                Cell(f"{point.tokens:,.0f}"),
                Cell(f"{point.flops:.6g}"),
                Cell(f"{point.seconds:.6g}"),
                Cell(fixed(point.loss)),
            )
            for curve in variant.curves
            for point in curve.points
        )
        columns = ("run", "seed", "step", "tokens", "FLOPs", "seconds of training", f"validation loss ({NATS})")
        tables.append(Table(f"Evaluations of {variant.name}", columns, rows))
    return tables
