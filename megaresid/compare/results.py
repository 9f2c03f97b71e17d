"""What a comparison finds, in the form of ``report.json``: every number with the runs and steps it came from."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

SCHEMA = 1


class Record(BaseModel):
    # JSON has neither NaN nor infinity: what is not known is None.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Record):
    """Where a number stands: the run, by its path below the folder that was compared, and the step of its metrics."""

    run: str
    step: int


class Sample(Record):
    """One seed's value of a metric."""

    seed: int
    value: float
    source: Source


class Estimate(Record):
    """A mean over seeds with its 95% interval (Student's t), which one seed does not have."""

    mean: float
    low: float | None
    high: float | None
    samples: tuple[Sample, ...]


class Difference(Record):
    """Variant minus baseline, paired by seed. ``p_*`` are two-sided; None where too few seeds allow no test."""

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    p_t: float | None
    p_permutation: float | None
    p_holm: float | None
    """The paired t-test's, after Holm's correction over all variants compared with the baseline."""
    detectable: float | None
    """The smallest difference that so many seeds show with 80% power at 5%, given the spread of these differences."""
    verdict: Literal["better", "worse", "not distinguishable", "too few seeds"]


class Metric(Record):
    """One number of an evaluation, over seeds."""

    name: str
    better: Literal["lower", "higher"]
    estimate: Estimate
    difference: Difference | None
    """Of a variant that is not the baseline."""


class Cost(Record):
    """Tokens per second exclude evaluation and saving. What is not known is None."""

    parameters: int
    flops_per_token: float
    tokens_per_second: Estimate
    step_seconds: Estimate
    step_ratio: float | None
    """Step time over the baseline's."""
    mfu: Estimate | None
    memory_bytes: Estimate


class Point(Record):
    """One evaluation of one run."""

    step: int
    tokens: float
    flops: float
    seconds: float
    """Of training alone."""
    loss: float


class Curve(Record):
    """Validation loss of one run."""

    run: str
    seed: int
    points: tuple[Point, ...]


class AtRate(Record):
    """A variant's final loss at one of the learning rates that it was trained with."""

    learning_rate: float
    loss: Estimate | None
    """None where no run of this rate came to its end."""
    diverged: int


class EqualCost(Record):
    """A variant's loss at what every variant has spent: the smallest of their totals. Interpolated along its curves."""

    tokens: Estimate | None
    flops: Estimate | None
    seconds: Estimate | None


class Variant(Record):
    """One model among those compared, at its best learning rate."""

    name: str
    spec_hash: str
    learning_rate: float
    at_edge: bool
    """Whether its best rate is the lowest or highest of several, so that a better one may lie beyond."""
    rates: tuple[AtRate, ...]
    loss: Estimate
    difference: Difference | None
    metrics: tuple[Metric, ...]
    cost: Cost
    equal: EqualCost
    curves: tuple[Curve, ...]


class Orders(Record):
    """The variants from best to worst, by each measure of cost."""

    tokens: tuple[str, ...]
    flops: tuple[str, ...]
    seconds: tuple[str, ...]
    remark: str
    """Whether they agree, in words."""


class Budget(Record):
    """What the equal-cost columns mean."""

    tokens: float
    flops: float
    seconds: float


class Differing(Record):
    """A key whose values differ between runs: (value, runs that have it)."""

    key: str
    values: tuple[tuple[str, tuple[str, ...]], ...]
    comparable: bool
    """Whether runs may be ranked all the same, as where the spec, the seed or the learning rate differ."""


class Problem(Record):
    """A run that could not be counted, or not wholly, and why."""

    run: str
    line: str


class Comparison(Record):
    """The whole of a report. Without ``refusal`` the variants are ranked; with it, it says why they are not."""

    schema_version: int = SCHEMA
    made: str
    baseline: str
    variants: tuple[Variant, ...]
    """The baseline first, then by the mean final loss."""
    orders: Orders | None
    budget: Budget | None
    differing: tuple[Differing, ...]
    problems: tuple[Problem, ...]
    refusal: str | None
    allowed: str | None
    """What differs and was allowed to, with the reason that the user gave."""
    notes: tuple[str, ...]
    """In words: what this comparison does and does not show."""
