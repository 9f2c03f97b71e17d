"""All runs of a sweep from its command line, checked as ``megaresid.train`` checks one, before anything is started."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaresid.config import MOST, RunConfig, from_flat, parse
from megaresid.errors import UserError
from megaresid.model.flops import training_flops_per_token
from megaresid.sweeping.axes import Budget, run_name, split_specs, variant_name
from megaresid.sweeping.folder import Axes, Run, Sweep
from megaresid.training.prepare import Prepared, prepare

SMALLEST = 0.1
"""Of the peak: where the learning rate ends, unless it is said."""
PLACED = ("run_dir", "resume", "allow_other", "dry_run")
"""Keys of a configuration that the sweep's folder decides."""
PATHS = ("data", "deepspeed_config", "eval_data", "init_from")


@dataclass(frozen=True)
class Wanted:
    """The command line; what is None comes from the configuration. ``rest`` are options of ``megaresid.train``."""

    residual: str | None
    attention: str | None
    seeds: list[int]
    rates: list[float] | None
    budget: Budget
    num_accelerators: int
    out: Path
    rest: list[str]


def plan(wanted: Wanted) -> tuple[Sweep, list[str]]:
    """The sweep, and lines about it. Raises UserError for what any of its runs would refuse, for a budget that is too
    small for one step, and for two names of one model."""
    given = parse([*wanted.rest, "--steps", "1", "--run-dir", str(wanted.out / "runs" / "any"), "--resume", "auto"])
    residuals = split_specs(wanted.residual or given.model.residual, "--residual")
    attentions = split_specs(wanted.attention or given.model.attention, "--attention")
    rates = wanted.rates or [given.optimizer.learning_rate]
    with_rate = {rate: _with_rate(wanted, rate) for rate in rates}
    variants, lines = _prepared(given, residuals, attentions, wanted)
    runs = []
    # All variants at a seed before the next one: a sweep that is cut short has compared them at some.
    for seed in wanted.seeds:
        for rate in rates:
            for name, (prepared, steps) in variants.items():
                model = {"residual": prepared.config.model.residual, "attention": prepared.config.model.attention}
                values = with_rate[rate].flat() | model | {"seed": seed, "steps": steps}
                runs.append(
                    Run(name=run_name(name, rate, seed), variant=name, config=_without_place(values), steps=steps)
                )
    axes = Axes(residual=residuals, attention=attentions, seeds=wanted.seeds, learning_rates=rates)
    budget, ranks = str(wanted.budget), wanted.num_accelerators
    return Sweep(axes=axes, budget=budget, num_accelerators=ranks, runs=tuple(runs)), lines


def _with_rate(wanted: Wanted, rate: float) -> RunConfig:
    """The configuration of all runs of a learning rate, apart from the model, the seed and the steps."""
    options = ["--learning-rate", repr(rate), "--steps", "1", "--run-dir", "any", "--resume", "auto"]
    if not any(argument.replace("_", "-").startswith("--min-learning-rate") for argument in wanted.rest):
        options += ["--min-learning-rate", f"{SMALLEST * rate:.6g}"]
    return parse([*wanted.rest, *options])


def _prepared(
    given: RunConfig, residuals: Sequence[str], attentions: Sequence[str], wanted: Wanted
) -> tuple[dict[str, tuple[Prepared, int | None]], list[str]]:
    """Each model, checked, with its steps (None: they are measured), by its name, and a line about each."""
    found: dict[str, tuple[Prepared, int | None]] = {}
    hashes: dict[str, str] = {}
    lines = []
    for attention in attentions:
        for residual in residuals:
            name, words = variant_name(residual, attention), f"--residual {residual} with --attention {attention}"
            place = {"run_dir": str(wanted.out / "runs" / name), "resume": "auto"}
            values = given.flat() | place | {"residual": residual, "attention": attention}
            prepared = prepare(from_flat(values, "the command line"), wanted.num_accelerators)
            if (other := hashes.setdefault(prepared.plan.hash, words)) != words:
                raise UserError(f"{words} is the same model as {other}: leave one out")
            if name in found:
                raise UserError(f"{words}: its runs would be named {name}, as another's are: leave one out")
            steps = _steps(prepared, wanted.budget, words)
            found[name] = prepared, steps
            lines.append(f"{name}: {_told(prepared, steps, wanted.budget)}")
    return found, lines


def tokens_per_step(prepared: Prepared) -> int:
    return prepared.batch.sequences * prepared.plan.shape.context


def _steps(prepared: Prepared, budget: Budget, words: str) -> int | None:
    """How many steps the budget pays for: as many as it pays for wholly."""
    if budget.unit == "seconds":
        return None
    a_step = tokens_per_step(prepared)
    if budget.unit == "flops":
        a_step *= training_flops_per_token(prepared.plan)
    return checked_steps(int(budget.amount) // a_step, budget, f"a step of {words} takes {a_step:.4g} {budget.unit}")


def checked_steps(steps: int, budget: Budget, reason: str) -> int:
    """Raises UserError for a number of steps that no run has."""
    if steps < 1:
        raise UserError(f"--budget {budget}: {reason}: give more")
    if steps > MOST:
        raise UserError(f"--budget {budget}: {reason}: give less, that is more than {MOST:,} steps")
    return steps


def _told(prepared: Prepared, steps: int | None, budget: Budget) -> str:
    if steps is None:
        return f"as many steps as take {budget.amount:g} s, once the time of a step is measured"
    tokens = steps * tokens_per_step(prepared)
    flops = tokens * training_flops_per_token(prepared.plan)
    epochs = tokens / prepared.data.training_tokens
    return f"{steps:,} steps, {tokens:,} tokens ({epochs:.2f} epochs), {flops:.4g} FLOPs a run"


def _without_place(values: dict[str, Any]) -> dict[str, Any]:
    """What every run is started with, wherever from: paths are whole."""
    values = {key: value for key, value in values.items() if key not in PLACED}
    for key in PATHS:
        path = values[key]
        if isinstance(path, list):
            values[key] = [str(Path(one).resolve()) for one in path]
        elif path is not None:
            values[key] = str(Path(path).resolve())
    return values
