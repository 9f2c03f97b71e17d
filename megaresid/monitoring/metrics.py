"""One place that every number of a run goes through: metrics.jsonl, TensorBoard, the user's monitors, the screen."""

import json
import math
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megaresid.monitoring.tensorboard import TensorBoard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Number = float | int | None
SCHEMA = 1
NOT_PRINTED = re.compile(r"seconds/.*|.*_stderr")
"""Of the numbers of an evaluation: its cost, and standard errors."""


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this rank has held: of the GPU's memory where there is one, else of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Recorder:
    """Writes rows of metrics. Only rank 0 makes one.

    A row is flushed at once, so that a killed run keeps what it knew. A disk that takes no more does not end a run: that
    is said once, and ``metrics.jsonl`` gets what it lacks with the next row for which there is room. On a terminal a
    progress bar stays below the lines; elsewhere there are lines alone.
    """

    def __init__(self, run: Path, first_step: int, steps: int, monitors=None):
        self._file = open(run / "metrics.jsonl", "a", buffering=1)
        self._tensorboard = TensorBoard(run / "tensorboard", first_step)
        self._monitors = monitors
        self._console = Console(soft_wrap=True, highlight=False)
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("training", total=steps, completed=first_step)
        self._steps = steps
        self._refused = False
        self._diagnosed = False

    def __enter__(self) -> "Recorder":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        for close in (self._tensorboard.close, self._file.close):
            with self._unless_refused():
                close()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def record(self, step: int, row: dict[str, Number], failed: dict[str, str] | None = None) -> None:
        """Store one row of named numbers for ``step``; what is None or not finite is null, and in no plot.

        ``failed`` are the hooks of an evaluation that failed, with what went wrong.
        """
        known = {name: value for name, value in row.items() if value is not None and math.isfinite(value)}
        # JSON has no NaN and no infinity.
        tree = {"schema": SCHEMA, "step": step, **dict.fromkeys(row), **known}
        with self._unless_refused():
            # What the disk refuses stays in the file's buffer.
            self._file.write(json.dumps(tree | ({"failed": failed} if failed else {})) + "\n")
        with self._unless_refused():
            self._tensorboard.scalars(known, step)
        if self._monitors is not None:
            with self._unless_refused():
                self._monitors.write_events([(name, value, step) for name, value in known.items()])

    def diagnosis(self, step: int, row: dict[str, Number], samples: Mapping[str, np.ndarray]) -> None:
        """Store what diagnostics found at ``step``: numbers as ``record`` does, and values for histograms."""
        self.record(step, row)
        with self._unless_refused():
            if not self._diagnosed:
                self._tensorboard.charts_by_depth(row)
            self._diagnosed = True
            for name, values in samples.items():
                if len(finite := values[np.isfinite(values)]):
                    self._tensorboard.histogram(name, finite, step)

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        with self._unless_refused():
            self._tensorboard.figure(name, figure, step)

    @contextmanager
    def _unless_refused(self) -> Iterator[None]:
        """Go on where the block's writing fails, and say so the first time."""
        try:
            yield
        except OSError as error:
            if not self._refused:
                self.say(f"metrics cannot be written ({error.strerror or error}): training goes on; make room")
            self._refused = True

    def describe(self, name: str, text: str) -> None:
        """A text for TensorBoard, such as the spec."""
        self._tensorboard.text(name, text)

    def say(self, line: str) -> None:
        self._console.print(line, markup=False)

    def progress_line(self, step: int, row: dict[str, Number]) -> None:
        mfu = row["mfu"]
        self.say(
            f"step {step}/{self._steps}  loss {row['train_loss']:.4f}  lr {row['learning_rate']:.3g}  "
            f"gradient norm {row['gradient_norm']:.3f}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"MFU {'n/a' if mfu is None else f'{mfu:.1%}'}  memory {row['memory_bytes'] / 2**30:.2f} GiB"
        )

    def evaluation_line(self, step: int, row: dict[str, Number]) -> None:
        """The machine-readable line of an evaluation: TRAIN_METRICS: step=…, train_loss=…, val_loss=…"""
        printed = (f"{name}={_print(value)}" for name, value in row.items() if not NOT_PRINTED.fullmatch(name))
        self.say("TRAIN_METRICS: " + ", ".join([f"step={step}", *printed]))


def _print(value: Number) -> str:
    return "nan" if value is None else f"{value:.6f}"
