"""Comparisons made of numbers that are given here, for the tests of what draws them."""

import math
import random

from megaresid.compare.results import (
    AtRate,
    Budget,
    Comparison,
    Cost,
    Curve,
    Difference,
    Differing,
    EqualCost,
    Estimate,
    Metric,
    Orders,
    Point,
    Problem,
    Sample,
    Source,
    Variant,
)

STEPS = range(0, 1001, 100)
TOKENS_PER_STEP = 524_288
START, SPAN = 10.83, 0.12


class Maker:
    """Numbers with an own draw for each, so that one that stands in a wrong place is found there."""

    def __init__(self, seeds: int = 3):
        self.seeds = range(1, seeds + 1)
        self.random = random.Random(5)

    def estimate(self, run: str, mean: float, spread: float) -> Estimate:
        samples = tuple(
            Sample(seed=seed, value=self.random.gauss(mean, spread), source=Source(run=f"{run}-{seed}", step=1000))
            for seed in self.seeds
        )
        middle = sum(sample.value for sample in samples) / len(samples)
        half = abs(self.random.gauss(2 * spread, spread / 4)) if len(samples) > 1 else None
        low, high = (None, None) if half is None else (middle - half, middle + half)
        return Estimate(mean=middle, low=low, high=high, samples=samples)

    def difference(self, mean: float, spread: float, verdict: str) -> Difference:
        seeds = tuple(self.seeds)
        if len(seeds) == 1:
            return Difference(
                mean=mean,
                low=None,
                high=None,
                seeds=seeds,
                p_t=None,
                p_permutation=None,
                p_holm=None,
                detectable=None,
                verdict="too few seeds",
            )
        half = spread * self.random.uniform(1.5, 2.5)
        p = self.random.uniform(0.1, 0.9) if verdict == "not distinguishable" else self.random.uniform(0.001, 0.02)
        return Difference(
            mean=mean,
            low=mean - half,
            high=mean + half,
            seeds=seeds,
            p_t=p,
            p_permutation=self.random.uniform(0.03, 0.9),
            p_holm=min(1, 1.37 * p),
            detectable=half * 1.43,
            verdict=verdict,
        )

    def curve(self, run: str, seed: int, end: float, flops: float, seconds: float) -> Curve:
        def loss(step):
            left = 1 - step / STEPS[-1]
            return end + SPAN * left + (START - end - SPAN) * math.exp(-step / 60) + self.random.gauss(0, 0.002) * left

        points = tuple(
            Point(
                step=step,
                tokens=step * TOKENS_PER_STEP,
                flops=step * TOKENS_PER_STEP * flops,
                seconds=step * seconds * (1 + seed / 100),
                loss=loss(step) if step < STEPS[-1] else end,
            )
            for step in STEPS
        )
        return Curve(run=run, seed=seed, points=points)

    def variant(self, name: str, change: float | None, verdict: str = "", slower: float = 0, rates: int = 3) -> Variant:
        """``change`` None: the baseline."""
        at = change or 0.0
        run = f"runs/{name}"
        loss = self.estimate(run, 2.2763 + at, 0.0015)
        flops, seconds = 2.1e9 * (1 + slower / 3), 1.4 * (1 + slower)
        tried = [1e-4, 3e-4, 1e-3][:rates] if rates > 1 else [3e-4]
        at_rates = tuple(
            AtRate(
                learning_rate=x,
                loss=loss if x == 3e-4 else self.estimate(f"{run}-{x}", 2.31 + at, 0.002),
                diverged=int(x == 1e-3),
            )
            for x in tried
        )
        metrics = tuple(
            Metric(
                name=what,
                better=better,
                estimate=self.estimate(run, value + scale * at, abs(scale) * 0.002),
                difference=None if change is None else self.difference(scale * at, abs(scale) * 0.004, verdict),
            )
            for what, better, value, scale in (
                ("wikitext2 perplexity", "lower", 44.28, 30.0),
                ("hellaswag accuracy", "higher", 0.3382, -0.3),
            )
        )
        return Variant(
            name=name,
            spec_hash=f"{self.random.getrandbits(48):012x}",
            learning_rate=3e-4,
            at_edge=False,
            rates=at_rates,
            loss=loss,
            difference=None if change is None else self.difference(at, 0.003, verdict),
            metrics=metrics,
            cost=Cost(
                parameters=354_823_168 + self.random.randrange(10**6),
                flops_per_token=flops,
                tokens_per_second=self.estimate(run, TOKENS_PER_STEP / seconds, 900.0),
                step_seconds=self.estimate(run, seconds, 0.004),
                step_ratio=None if change is None else 1 + slower,
                mfu=self.estimate(run, 0.41 / (1 + slower), 0.002),
                memory_bytes=self.estimate(run, 61.5e9 * (1 + slower / 2), 1e7),
            ),
            equal=EqualCost(
                tokens=self.estimate(run, 2.28 + at, 0.001),
                flops=self.estimate(run, 2.28 + at + slower / 20, 0.001),
                seconds=self.estimate(run, 2.28 + at + slower / 10, 0.001),
            ),
            curves=tuple(
                self.curve(f"{run}-{s.seed}", s.seed, s.value, flops, seconds) for s in loss.samples
            ),
        )


def made_comparison(
    changes: dict[str, tuple[float, str, float]] | None = None,
    seeds: int = 3,
    rates: int = 3,
    baseline: str = "vanilla",
) -> Comparison:
    """Of ``{name: (difference to the baseline, verdict, how much slower its step is)}``."""
    if changes is None:
        changes = {
            "attention_residual(blocks=8)": (-0.0219, "better", 0.09),
            "learned_scaling": (-0.0023, "not distinguishable", 0.05),
            "hyper_connection(streams=4, dynamic=true)": (0.0184, "worse", 0.31),
        }
    maker = Maker(seeds)
    variants = [maker.variant(baseline, None, rates=rates)]
    variants += [maker.variant(name, *change, rates=rates) for name, change in changes.items()]
    orders = Orders(
        **{
            what: tuple(v.name for v in sorted(variants, key=lambda v: getattr(v.equal, what).mean))
            for what in ("tokens", "flops", "seconds")
        },
        remark="The order at equal time is another than at equal tokens.",
    )
    return Comparison(
        made="2026-11-21T19:00:00Z",
        baseline=baseline,
        variants=tuple(variants),
        orders=orders,
        budget=Budget(tokens=524_288_000.0, flops=1.101e18, seconds=1414.0),
        differing=(
            Differing(
                key="seed",
                values=tuple((str(seed), tuple(f"runs/{v.name}-{seed}" for v in variants)) for seed in maker.seeds),
                comparable=True,
            ),
        ),
        problems=(Problem(run="runs/prores-2", line="not counted: it ended at step 420 of 1000"),),
        refusal=None,
        allowed=None,
        notes=("What held for 1,000 steps need not hold for more.",),
    )
