"""The answer of a comparison in sentences: who is better, by how much, and who cannot be told apart."""

from dataclasses import dataclass

from megaresid.compare.results import Comparison, Difference, Estimate, Variant
from megaresid.compare.units import (
    FLOPS,
    TIME,
    TOKENS,
    UNKNOWN,
    counted,
    fixed,
    probability,
    rate,
    significant,
    unit_for,
)

VERDICTS = {
    "better": "Better",
    "worse": "Worse",
    "not distinguishable": "Not distinguishable",
    "too few seeds": "Too few seeds to tell",
    "not compared": "Not compared",
}
SAME_COST = 0.02
"""By how much of itself a total of FLOPs or seconds may differ and still be called equal: a step more or less."""


@dataclass(frozen=True)
class Finding:
    """What is said of one variant; ``place`` puts the better ones first."""

    place: int
    verdict: str
    name: str
    words: str

    @property
    def title(self) -> str:
        return VERDICTS[self.verdict]


def in_order(comparison: Comparison) -> tuple[Variant, ...]:
    """The variants as they are shown: as they stand, or by name where no ranking is to be read off the order."""
    if comparison.refusal is None:
        return comparison.variants
    return tuple(sorted(comparison.variants, key=lambda variant: (variant.name != comparison.baseline, variant.name)))


def findings(comparison: Comparison) -> list[Finding]:
    """One for each variant but the baseline, the better ones first; none where none is ranked."""
    if comparison.refusal is not None:
        return []
    found = []
    for variant in comparison.variants:
        if variant.difference is not None:
            verdict, words = variant.difference.verdict, _words(variant.difference)
        else:
            verdict, words = "not compared", "no seed was trained with both it and the baseline"
        if variant.name != comparison.baseline:
            found.append(Finding(list(VERDICTS).index(verdict), verdict, variant.name, words))
    return sorted(found, key=lambda finding: finding.place)


def _words(difference: Difference) -> str:
    seeds = counted(len(difference.seeds), "seed")
    half = half_width(difference)
    about = "" if half is None else f" ± {fixed(half)}"
    p = "" if difference.p_holm is None else f"p {_equals(difference.p_holm)} after Holm, "
    if difference.mean == difference.low == difference.high == 0:
        return f"the same loss as the baseline's in each of {seeds}"
    match difference.verdict:
        case "better" | "worse":
            lower = "lower" if difference.mean < 0 else "higher"
            return f"loss {lower} by {fixed(abs(difference.mean))}{about} ({p}{seeds})"
        case "not distinguishable":
            shown = ""
            if difference.detectable is not None:
                shown = f"; a true difference of about {fixed(difference.detectable)} could have been shown"
            return f"difference {fixed(difference.mean, signed=True)}{about} ({p}{seeds}{shown})"
        case _:
            return f"difference {fixed(difference.mean, signed=True)}{about} ({seeds})"


def _equals(p: float) -> str:
    text = probability(p)
    return text if text.startswith("<") else f"= {text}"


def half_width(estimate: Estimate | Difference) -> float | None:
    """Half of an interval that lies evenly about its mean."""
    if estimate.low is None or estimate.high is None:
        return None
    return (estimate.high - estimate.low) / 2


def interval(estimate: Estimate | Difference, places: int, signed: bool = False) -> str:
    """``2.2710 to 2.2790``; one seed has none."""
    if estimate.low is None or estimate.high is None:
        return UNKNOWN
    return f"{fixed(estimate.low, places, signed)} to {fixed(estimate.high, places, signed)}"


def footing(comparison: Comparison) -> str:
    """At what cost the final losses were had, read off where the curves end."""
    ends = [curve.points[-1] for variant in comparison.variants for curve in variant.curves if curve.points]
    if not ends:
        return "at the end of the runs"
    for what, name, units, tolerance in (
        ("tokens", "tokens", TOKENS, 0.0),
        ("flops", "FLOPs", FLOPS, SAME_COST),
        ("seconds", "time", TIME, SAME_COST),
    ):
        values = [getattr(end, what) for end in ends]
        if max(values) - min(values) <= tolerance * max(values):
            return f"at equal {name} ({amount(max(values), units)})"
    return "at the end of runs of different cost"


def amount(value: float, units: tuple) -> str:
    """A total of tokens, FLOPs or seconds with its unit."""
    if units is TOKENS:
        return f"{value:,.0f} tokens"
    unit = unit_for([value], units)
    return f"{significant(value / unit.factor)} {unit.name}"


def baseline_words(comparison: Comparison) -> str:
    """The loss that the differences count from."""
    found = [variant for variant in comparison.variants if variant.name == comparison.baseline]
    if not found:
        return ""
    half = half_width(found[0].loss)
    about = "" if half is None else f" ± {fixed(half)}"
    return f"loss {fixed(found[0].loss.mean)}{about}, {counted(len(found[0].loss.samples), 'seed')}"


def warnings(comparison: Comparison) -> list[str]:
    """What a reader must know beside the answer."""
    said = []
    edges = [f"{v.name} ({rate(v.learning_rate)})" for v in in_order(comparison) if v.at_edge]
    if edges:
        listed = ", ".join(edges)
        said.append(f"Best at the edge of the learning rates tried, so that a better one may lie beyond: {listed}.")
    diverged = [(variant.name, sum(at.diverged for at in variant.rates)) for variant in in_order(comparison)]
    if any(count for _, count in diverged):
        said.append("Diverged runs: " + ", ".join(f"{count} of {name}" for name, count in diverged if count) + ".")
    if comparison.problems:
        count = counted(len({problem.run for problem in comparison.problems}), "run")
        said.append(f"{count} could not be counted, or not wholly: see the problems below.")
    return said
