"""How long a step of each variant takes: a short run of it, under the conditions of the sweep."""

import shutil
from statistics import median

from megaresid.sweeping.axes import Budget
from megaresid.sweeping.folder import Folder, Sweep, metrics_of
from megaresid.sweeping.plan import checked_steps
from megaresid.sweeping.progress import State
from megaresid.sweeping.running import Job

STEPS, PIECE = 20, 5
"""A run of so many steps is timed in pieces; the first has the warm-up, compilation too, and does not count."""

SHORT = {"steps": STEPS, "eval": "", "log_interval": PIECE, "checkpoint_interval": 0}


def jobs_of(folder: Folder, sweep: Sweep, variants: set[str]) -> list[Job]:
    """A short run for each of these variants that has not been measured: of its first seed and learning rate. What is
    left of an earlier attempt is deleted."""
    found: dict[str, Job] = {}
    for run in sweep.runs:
        if run.steps is None and run.variant in variants - sweep.step_seconds.keys() - found.keys():
            name, place = f"calibration-{run.variant}", folder.calibration(run.variant)
            shutil.rmtree(place, ignore_errors=True)
            values = run.config | SHORT | {"run_dir": str(place), "resume": None}
            config, log = folder.write_config(name, values), folder.log(name)
            found[run.variant] = Job(name, run, place, config, log, State(name, "waiting", STEPS))
    return list(found.values())


def step_seconds(job: Job) -> float:
    """Of the steps after the first piece, the median over pieces."""
    rows = [row for row in metrics_of(job.place) if "training_seconds" in row]
    pairs = zip(rows, rows[1:])
    return median((b["training_seconds"] - a["training_seconds"]) / (b["step"] - a["step"]) for a, b in pairs)


def with_steps(sweep: Sweep, measured: dict[str, float], budget: Budget) -> Sweep:
    """The sweep with the steps that the budget pays for, where the time of a step has been measured. Raises UserError
    for a budget below one step."""
    known = sweep.step_seconds | measured
    runs = []
    for run in sweep.runs:
        if run.steps is None and run.variant in known:
            a_step = known[run.variant]
            reason = f"a step of {run.variant} takes {a_step:.4g} seconds"
            run = run.of_steps(checked_steps(int(budget.amount / a_step), budget, reason))
        runs.append(run)
    return sweep.model_copy(update={"runs": tuple(runs), "step_seconds": known})
