"""Run directories, read back: what each run was, its numbers, and whether it came to its end. Imports no torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megaresid.compare.results import Problem, Source
from megaresid.errors import UserError
from megaresid.json_text import parse_json

SCHEMA = 1
"""Of the files of a run and of a sweep."""
FILES = ("config.json", "spec.json", "ds_config.json", "environment.json", "data.json")
INITIAL = "initial.json"
"""What a run started from; runs of earlier versions have none."""
OUTCOME = "outcome.json"
"""How a run ended: null while it has not; runs of earlier versions have none."""
UNHEALTHY = "unhealthy"
SWEEP = "sweep.json"
REPORT = "report.json"
MOST = 2**53
"""Of any whole number: beyond it a float skips some."""
LARGEST, SMALLEST = 1e100, 1e-100
"""Of numbers that are measured."""

Tree = Mapping[str, Any]


class Unreadable(Exception):
    """Why a run cannot be counted, in words that follow its name."""


class _Known(BaseModel):
    """What a comparison needs of a file; a file may hold more."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)


class _Config(_Known):
    steps: int = Field(ge=1, le=MOST)
    seed: int = Field(ge=0, le=MOST)
    learning_rate: float = Field(ge=0)
    global_batch_size: int = Field(ge=1, le=MOST)
    attention: str
    residual: str


class _Shape(_Known):
    context: int = Field(ge=1, le=MOST)


class _Spec(_Known):
    hash: str = Field(pattern="^[0-9a-f]{64}$")
    shape: _Shape
    parameters: int | None = Field(None, ge=0, le=MOST)
    flops_per_token: int | None = Field(None, ge=1, le=MOST)


class _Data(_Known):
    identity: str


class _Outcome(_Known):
    outcome: str | None
    step: int = Field(ge=0, le=MOST)


class _Planned(_Known):
    name: str
    config: dict[str, Any]


class _Sweep(_Known):
    runs: list[_Planned]


NEEDED: dict[str, type[_Known]] = {"config.json": _Config, "spec.json": _Spec, "data.json": _Data}


@dataclass(frozen=True)
class At:
    """One validation of a run: after ``step`` updates on ``tokens`` tokens and ``seconds`` of training alone."""

    step: int
    tokens: float
    seconds: float
    loss: float


@dataclass(frozen=True)
class Run:
    """A run directory that can be read. ``name`` is its path below what was compared; ``files`` are its JSON files by
    name, ``rows`` those of its metrics."""

    name: str
    path: Path
    files: Mapping[str, Tree]
    rows: Sequence[Tree]

    @cached_property
    def known(self) -> _Config:
        return _Config.model_validate(self.config)

    @cached_property
    def spec(self) -> _Spec:
        return _Spec.model_validate(self.files["spec.json"])

    @property
    def config(self) -> Tree:
        return self.files["config.json"]

    @property
    def seed(self) -> int:
        return self.known.seed

    @property
    def learning_rate(self) -> float:
        return self.known.learning_rate

    @property
    def steps(self) -> int:
        return self.known.steps

    @property
    def tokens_per_step(self) -> int:
        return self.known.global_batch_size * self.spec.shape.context

    @property
    def started(self) -> str:
        return str(self.files["environment.json"].get("started"))

    @cached_property
    def last_step(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def source(self) -> Source:
        """Where the numbers of its last step stand."""
        return Source(run=self.name, step=self.last_step)

    @cached_property
    def validations(self) -> tuple[At, ...]:
        """In the order of the steps; those whose loss is not finite are left out."""
        seconds, found = {0: 0.0}, {}
        for row in self.rows:
            if (spent := number(row, "training_seconds")) is not None:
                seconds[row["step"]] = spent
        for row in self.rows:
            loss, step = number(row, "val_loss"), row["step"]
            if loss is not None and step in seconds:
                found[step] = At(step, float(step * self.tokens_per_step), seconds[step], loss)
        return tuple(found.values())

    @cached_property
    def final(self) -> At | None:
        """The validation of its last step; None where there is none, or where its loss is not finite."""
        return next((at for at in self.validations if at.step == self.steps), None)

    @property
    def has_cost(self) -> bool:
        """Whether its rows tell its speed and memory."""
        return any(value > 0 for value in self.values("tokens_per_second")) and bool(self.values("memory_bytes"))

    def values(self, key: str) -> list[float]:
        """The finite numbers of that name, of all rows."""
        return [value for row in self.rows if (value := number(row, key)) is not None]

    def measured_at_end(self) -> dict[str, float]:
        """All finite numbers of its last step's rows."""
        rows = (row for row in self.rows if row["step"] == self.steps)
        return {plain(key): value for row in rows for key in row if (value := number(row, key)) is not None}

    @cached_property
    def state(self) -> Literal["ended", "diverged", "unfinished"]:
        stopped = self._stopped_by_health()
        if self.final is not None and self.has_cost and not stopped:
            return "ended"
        training = [row for row in self.rows if "train_loss" in row]
        at_end = [row for row in self.rows if row["step"] == self.steps and "val_loss" in row]
        lost = self.final is None and (at_end or training and number(training[-1], "train_loss") is None)
        return "diverged" if lost or stopped else "unfinished"

    def _stopped_by_health(self) -> bool:
        if OUTCOME in self.files:
            return self.files[OUTCOME]["outcome"] == UNHEALTHY
        return self.final is None and self._seems_stopped_by_health()

    def _seems_stopped_by_health(self) -> bool:
        """Of a run that did not record how it ended: whether its newest bad step is one after which the health guard
        ends a run."""
        try:
            kept = max((self.path / "forensics").glob("step_*.json"), default=None)
            bad = kept and _object(kept)
        except (OSError, Unreadable):
            return False
        if not bad or (number(bad, "step") or 0) < self.last_step or bad.get("updated") is not False:
            return False
        skipped, most = number(bad, "skipped_in_a_row"), number(self.config, "max_bad_steps")
        return self.config.get("on_spike") == "stop" or (skipped or 0) >= (most or math.inf)

    def not_ended(self) -> str:
        """Of one that did not come to its end, why it is not counted."""
        last = max(self.last_step, self.files.get(OUTCOME, {}).get("step", 0))
        reached = f"step {last:,} of {self.steps:,}"
        if self.state == "diverged":
            return f"diverged: its losses are not finite, or its health guard ended it, at {reached}"
        if self.final is not None:
            return "not counted: its metrics hold no tokens_per_second or no memory_bytes"
        if self.last_step == self.steps:
            mend = "go on with it by --resume auto" if self.validations else "it needs validation in --eval"
            return f"not counted: no validation loss at its last step {self.steps:,}; {mend}"
        return f"unfinished at {reached}: not counted; go on with it by --resume auto"


@dataclass(frozen=True)
class Planned:
    """A run that a sweep names and of which there is no directory."""

    name: str
    config: Tree


@dataclass(frozen=True)
class Found:
    """What lies at the paths: runs, ended or not, what a sweep misses, and what could not be read."""

    runs: tuple[Run, ...]
    planned: tuple[Planned, ...]
    problems: tuple[Problem, ...]


def plain(text: str) -> str:
    """With what would move a terminal's cursor, or is no text, written out as Python does: anybody may have written
    a run directory."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def number(row: Tree, key: str) -> float | None:
    """A finite number; None for anything else, and where it is not there. What is so large or so small that squares of
    it and quotients by it are not finite, is none or zero."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > LARGEST or value != value:
        return None
    return float(value) if abs(value) > SMALLEST else 0.0


def read_runs(paths: Sequence[Path]) -> Found:
    """Each path is a run, a folder of runs or sweeps, or a sweep. Raises UserError for one that is no folder; whatever
    is wrong inside is a ``Problem``."""
    runs: dict[Path, Run] = {}
    planned: list[Planned] = []
    problems: list[Problem] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: there is no such folder: name a run directory, a folder of them, or a sweep")
        prefix = _prefix(path, paths)
        for name, found in _within(path):
            name = plain(f"{prefix}{name}" if name else prefix.rstrip("/") or path.resolve().name)
            if isinstance(found, str):
                problems.append(Problem(run=name, line=plain(found)))
            elif isinstance(found, dict):
                planned.append(Planned(name, found))
                problems.append(Problem(run=name, line="missing: its sweep names it, and there is no such run yet"))
            elif found.resolve() not in runs:
                try:
                    runs[found.resolve()] = read_run(found, name)
                except Unreadable as problem:
                    problems.append(Problem(run=name, line=plain(str(problem))))
    return Found(tuple(runs.values()), tuple(planned), tuple(problems))


def _prefix(path: Path, paths: Sequence[Path]) -> str:
    """Of a path among several: its own name where that tells it from the others."""
    if len(paths) == 1:
        return ""
    names = [other.resolve().name for other in paths]
    return f"{path.resolve().name if names.count(path.resolve().name) == 1 else path}/"


def _within(path: Path) -> Iterator[tuple[str, Path | str | dict[str, Any]]]:
    """Names below ``path``, each with a run directory, the configuration of a run that is missing, or what is wrong."""
    try:
        if _is_run(path):
            yield "", path
        elif (path / SWEEP).exists():
            yield from _of_sweep(path)
        else:
            yield from _of_folder(path)
    except OSError as error:
        yield "", f"cannot be read: {error.strerror}"


def _of_folder(path: Path) -> Iterator[tuple[str, Path | str | dict[str, Any]]]:
    for folder in sorted(path.iterdir()):
        try:
            yield from _of_entry(folder)
        except OSError as error:
            yield folder.name, f"cannot be read: {error.strerror}"


def _of_entry(folder: Path) -> Iterator[tuple[str, Path | str | dict[str, Any]]]:
    if not folder.is_dir() or folder.name.startswith(".") or (folder / REPORT).exists():
        return
    if (folder / SWEEP).exists() and not _is_run(folder):
        for name, found in _of_sweep(folder):
            yield f"{folder.name}/{name}".rstrip("/"), found
    elif _is_run(folder):
        yield folder.name, folder
    else:
        yield folder.name, "not counted: neither a run (no config.json) nor a sweep (no sweep.json)"


def _of_sweep(path: Path) -> Iterator[tuple[str, Path | str | dict[str, Any]]]:
    there, present = path / "runs", set()
    if there.is_dir():
        present = {folder.name for folder in there.iterdir()}
        yield from ((f"runs/{name}", found) for name, found in _of_folder(there))
    try:
        tree = _object(path / SWEEP)
        _check_schema(SWEEP, tree)
        sweep = _known(SWEEP, _Sweep, tree)
    except Unreadable as problem:
        yield SWEEP, f"{problem}; which runs are missing is not known"
        return
    for run in sweep.runs:
        # A name that leads elsewhere is no run of the sweep's.
        if Path(run.name).name == run.name and run.name not in {"", "..", *present}:
            yield f"runs/{run.name}", run.config


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.json", "metrics.jsonl"))


def read_run(path: Path, name: str) -> Run:
    """Raises Unreadable: something is missing, damaged, of another version, or no run of ours."""
    try:
        files = {file: _object(path / file) for file in FILES}
        for file, tree in files.items():
            _check_schema(file, tree)
        for file, model in NEEDED.items():
            _known(file, model, files[file])
        if (path / INITIAL).exists():
            files[INITIAL] = _object(path / INITIAL)
        if (path / OUTCOME).exists():
            files[OUTCOME] = _object(path / OUTCOME)
            _check_schema(OUTCOME, files[OUTCOME])
            _known(OUTCOME, _Outcome, files[OUTCOME])
        rows = _rows(path / "metrics.jsonl")
    except OSError as error:
        raise Unreadable(f"not counted: {Path(error.filename or path).name} cannot be read: {error.strerror}") from None
    return Run(name, path, files, rows)


def _known(file: str, model: type[_Known], tree: Tree) -> _Known:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise Unreadable(f"not counted: {file} is damaged or no run's: {key}: {problem['msg']}") from None


def _check_schema(file: str, tree: Tree) -> None:
    if (schema := tree.get("schema")) != SCHEMA:
        what = "it has no schema, so that it is no run of ours" if schema is None else f"its schema is {schema!r:.20}"
        raise Unreadable(f"not counted: {file}: {what}; this version of megaresid reads {SCHEMA}")


def _object(path: Path) -> dict[str, Any]:
    """Raises Unreadable and OSError."""
    try:
        tree = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise Unreadable(f"not counted: no {path.name}") from None
    except ValueError as error:
        raise Unreadable(f"not counted: {path.name} is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise Unreadable(f"not counted: {path.name} is damaged: it is no object of keys and values")
    return tree


def _rows(path: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl. A last line that a crash cut short is left out; any other that is no row, and steps or seconds
    that go back, are damage."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise Unreadable("not counted: no metrics.jsonl: it ended before its first step") from None
    lines, rows, before = text.split(b"\n"), [], (0, 0.0)
    for count, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            if count == len(lines):
                break
            raise Unreadable(f"not counted: metrics.jsonl is damaged: line {count} is not JSON") from None
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is not int or not 0 <= step <= MOST:
            raise Unreadable(f"not counted: metrics.jsonl is damaged: line {count} is no row with a step")
        seconds = number(row, "training_seconds")
        seconds = before[1] if seconds is None else seconds
        if step < before[0] or seconds < before[1]:
            raise Unreadable(f"not counted: metrics.jsonl is damaged: line {count} goes back in steps or seconds")
        before = step, seconds
        rows.append(row)
    return rows
