"""How far a sweep is: one table that is drawn anew on a terminal, lines elsewhere."""

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 60.0
"""Between two lines about a run that is under way, where there is no table."""
ORDER = ("running", "failed", "waiting", "finished")


@dataclass
class State:
    """Of one run: how it stands, and what its metrics say."""

    name: str
    status: str
    steps: int | None
    step: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    step_seconds: float | None = None
    told: float = 0.0

    def take(self, rows: list[dict[str, Any]]) -> None:
        """Read the rows of the run's metrics."""
        trained = [row for row in rows if row.get("train_loss") is not None and row.get("training_seconds")]
        if trained:
            self.step, self.loss = trained[-1]["step"], trained[-1]["train_loss"]
            before = trained[-2] if len(trained) > 1 else {"step": 0, "training_seconds": 0.0}
            made = self.step - before["step"]
            if made > 0:
                self.step_seconds = (trained[-1]["training_seconds"] - before["training_seconds"]) / made
        measured = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
        self.validation_loss = measured[-1] if measured else None

    @property
    def seconds_left(self) -> float | None:
        """Of training, at the pace of the last steps."""
        if self.steps is None or self.step_seconds is None:
            return None
        return max(self.steps - self.step, 0) * self.step_seconds


class Progress:
    """Use as a context manager. ``states`` are of all runs, in the order of the sweep."""

    def __init__(self, states: list[State], jobs: int):
        self._states, self._jobs = states, jobs
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self._live = Live(console=self.console, auto_refresh=False, get_renderable=self._table)

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.console.is_terminal:
            self.refresh()
            self._live.stop()

    def say(self, line: str) -> None:
        self.console.print(line)

    def refresh(self) -> None:
        """Show how far the runs are now."""
        if self.console.is_terminal:
            self._live.refresh()
            return
        now = time.monotonic()
        for state in self._states:
            if state.status == "running" and state.step and now - state.told >= LINE_SECONDS:
                state.told = now
                self.say(f"{state.name}: step {state.step}/{state.steps}, {_losses(state)}, {_left(state)} left")

    def _table(self) -> Group:
        table = Table("run", "", box=None, pad_edge=False)
        for heading in ("step", "train loss", "val loss", "time left"):
            table.add_column(heading, justify="right")
        room = max(self.console.height - 4, 4)
        for state in sorted(self._states, key=lambda state: ORDER.index(state.status))[:room]:
            step = f"{state.step:,}/{'?' if state.steps is None else format(state.steps, ',')}"
            left = _left(state) if state.status == "running" else ""
            losses = (_number(state.loss), _number(state.validation_loss))
            table.add_row(state.name, state.status, step, *losses, left)
        return Group(table, Text(self.summary()))

    def summary(self) -> str:
        counts = {status: sum(state.status == status for state in self._states) for status in ORDER}
        parts = [f"{counts[status]} {status}" for status in reversed(ORDER) if counts[status]]
        left = self._seconds_left()
        return f"{len(self._states)} runs: {', '.join(parts)}" + (f", about {duration(left)} left" if left else "")

    def _seconds_left(self) -> float | None:
        """Of the sweep: what waits is taken to be as fast, on average, as what has been seen."""
        paces = [state.step_seconds for state in self._states if state.step_seconds]
        open_states = [state for state in self._states if state.status in ("running", "waiting")]
        if not paces or not open_states or any(state.steps is None for state in open_states):
            return None
        pace = sum(paces) / len(paces)
        work = sum((state.steps - state.step) * (state.step_seconds or pace) for state in open_states)
        return work / min(self._jobs, len(open_states))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _left(state: State) -> str:
    return duration(state.seconds_left)


def _losses(state: State) -> str:
    validation = "" if state.validation_loss is None else f", val_loss {state.validation_loss:.4f}"
    return f"train_loss {_number(state.loss)}{validation}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
