"""The folder of a sweep: what is to be run (``sweep.json``), the runs, and how each ended.

::

    sweep.json           the axes, the budget and every run with its configuration
    runs/NAME            an ordinary run directory
    configs/NAME.json    what the run is started with
    logs/NAME.log        its output
    outcomes/NAME.json   how it ended
    calibration/VARIANT  the short runs that measure the time of a step, where the budget is in seconds
"""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megaresid import exit_codes
from megaresid.durable import write_text
from megaresid.errors import UserError
from megaresid.json_text import parse_json
from megaresid.training.run_dir import read_metrics, write_json

SCHEMA = 1
FILE, LOCK, MEASURING = "sweep.json", ".lock", ".measuring"
WAIT_SECONDS = 0.5


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Axes(Record):
    residual: tuple[str, ...]
    attention: tuple[str, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]


class Run(Record):
    """One run: ``config`` has every key of a configuration but those that its place decides. ``steps`` is None until
    the time of the variant's step is measured."""

    name: str
    variant: str
    config: dict[str, Any]
    steps: int | None

    @property
    def seed(self) -> int:
        return self.config["seed"]

    def of_steps(self, steps: int) -> "Run":
        return self.model_copy(update={"steps": steps, "config": self.config | {"steps": steps}})


class Sweep(Record):
    """``step_seconds`` has the measured time of a step by variant, where the budget is in seconds."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    axes: Axes
    budget: str
    num_accelerators: int
    step_seconds: dict[str, float] = {}
    runs: tuple[Run, ...]


class Folder:
    """Paths and records of a sweep; nothing is written until it is said."""

    def __init__(self, path: Path):
        self.path = path

    def run(self, name: str) -> Path:
        return self.path / "runs" / name

    def calibration(self, variant: str) -> Path:
        return self.path / "calibration" / variant

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def config(self, name: str) -> Path:
        return self.path / "configs" / f"{name}.json"

    def read(self) -> Sweep | None:
        """The sweep that is there; None for a new or empty folder. Raises UserError for anything else."""
        path = self.path / FILE
        if not path.is_file():
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"--out {self.path} is a file: name a folder")
            if self.path.is_dir() and any(entry.name != LOCK for entry in self.path.iterdir()):
                raise UserError(f"--out {self.path} holds something that is no sweep: choose another folder")
            return None
        try:
            return Sweep.model_validate(parse_json(path.read_bytes()))
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise UserError(f"{path} is damaged or another version's: {place}: {problem['msg']}") from None
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from None

    def write(self, sweep: Sweep) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / FILE, sweep.model_dump_json(indent=2, by_alias=True) + "\n")

    def write_config(self, name: str, values: dict[str, Any]) -> Path:
        path = self.config(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
        return path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One sweep at a time works in a folder; raises UserError where another does."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--out {self.path}: another sweep is at work there: wait for it") from None
            yield

    @contextmanager
    def measuring(self, given_up: Callable[[], bool]) -> Iterator[bool]:
        """Measure the time of steps while nobody else does; False where that was given up before it was one's turn."""
        with open(self.path / MEASURING, "a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield True
                    return
                except BlockingIOError:
                    if given_up():
                        yield False
                        return
                time.sleep(WAIT_SECONDS)

    def record_outcome(self, name: str, code: int, line: str) -> None:
        path = self._outcome(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": SCHEMA, "code": code, "line": line})

    def _outcome(self, name: str) -> Path:
        return self.path / "outcomes" / f"{name}.json"

    def outcome(self, name: str) -> tuple[int, str] | None:
        """The exit code of the run's last start and a line about it; None where it has not ended, or was deleted."""
        if not self.run(name).is_dir():
            return None
        try:
            found = parse_json(self._outcome(name).read_bytes())
            return int(found["code"]), str(found["line"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_finished(self, run: Run) -> bool:
        """Whether it ended well and the metrics of its last step are there."""
        outcome = self.outcome(run.name)
        return outcome is not None and outcome[0] == exit_codes.FINISHED and last_step(self.run(run.name)) == run.steps

    def has_diverged(self, run: Run) -> bool:
        """Whether the health guard ended it: started again, it would go the same way."""
        outcome = self.outcome(run.name)
        return outcome is not None and outcome[0] == exit_codes.UNHEALTHY


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics; none where there are none yet, or no longer."""
    try:
        return read_metrics(run)
    except (OSError, UserError):
        return []


def last_step(run: Path) -> int:
    """The last step that was trained and recorded; 0 for none."""
    return max((row["step"] for row in metrics_of(run) if "train_loss" in row), default=0)


def merged(old: Sweep, new: Sweep, out: Path) -> Sweep:
    """The sweep that is in the folder with what the command adds to its axes. Raises UserError, naming what differs,
    where the command is not that of the sweep."""
    mend = "give the command that began it, with more on its axes or none, or another --out"
    for what in ("budget", "num_accelerators"):
        was, now = getattr(old, what), getattr(new, what)
        if was != now:
            raise UserError(f"--out {out}: its sweep has --{what.replace('_', '-')} {was}, not {now}: {mend}")
    wanted = {run.name: run for run in new.runs}
    for run in old.runs:
        if run.name not in wanted:
            raise UserError(f"--out {out}: its sweep has a run {run.name}, which the command leaves out: {mend}")
        now = wanted.pop(run.name).config
        measured = {"steps"} if new.budget.startswith("seconds") else set()
        for key in run.config.keys() | now.keys():
            if key not in measured and run.config.get(key) != now.get(key):
                was, wants = run.config.get(key), now.get(key)
                raise UserError(f"--out {out}: its run {run.name} has {key}={was!r}, and the command {wants!r}: {mend}")
    return new.model_copy(update={"runs": (*old.runs, *wanted.values()), "step_seconds": old.step_seconds})
