"""How far a job is: a bar on a terminal, else a plain line every half minute, on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 30
# The bar's own columns of speed and time left count what was there before a job was resumed: Pace does not.

# Called with the fraction done (0 to 1) and, where they are known, the documents and tokens so far.
Report = Callable[[float, int, int], None]


def no_report(fraction: float, documents: int, tokens: int) -> None:
    pass


class Pace:
    """Tokens per second and seconds left, from what was done since the first report."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._first: tuple[float, float, int] | None = None

    def line(self, fraction: float, documents: int, tokens: int) -> str:
        now = self._clock()
        start, first_fraction, first_tokens = self._first = self._first or (now, fraction, tokens)
        seconds, done = now - start, fraction - first_fraction
        parts = [f"{documents:,} documents"] if documents else []
        if tokens:
            speed = f" ({(tokens - first_tokens) / seconds:,.0f}/s)" if seconds else ""
            parts.append(f"{tokens:,} tokens{speed}")
        if done > 0 and seconds:
            parts.append(f"{duration(seconds * (1 - fraction) / done)} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as "40 s", "12 min" or "3 h 05 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def progress_display() -> Iterator[Report]:
    """Yields what a job reports to."""
    console, pace = Console(stderr=True), Pace()
    if not console.is_terminal:
        yield _report_in_lines(pace)
        return
    columns = TextColumn("{task.percentage:3.0f}%"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=1.0)

        def report(fraction: float, documents: int, tokens: int) -> None:
            progress.update(bar, completed=fraction, description=pace.line(fraction, documents, tokens))

        yield report


def _report_in_lines(pace: Pace, clock: Callable[[], float] = time.monotonic) -> Report:
    shown = clock()

    def report(fraction: float, documents: int, tokens: int) -> None:
        nonlocal shown
        line = pace.line(fraction, documents, tokens)
        if clock() - shown >= SECONDS_BETWEEN_LINES:
            shown = clock()
            print(f"{fraction:4.0%}  {line}", file=sys.stderr, flush=True)

    return report
