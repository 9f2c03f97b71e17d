"""How far an evaluation is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import track

LINE_SECONDS = 30.0

T = TypeVar("T")


def followed(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, one by one, while standard error tells how many of ``total`` are done.

    There is one bar at a time on a terminal: where another is being drawn, lines appear above it.
    """
    console = Console(stderr=True)
    if console.is_terminal and not isinstance(sys.stderr, FileProxy):
        yield from track(items, what, total, console=console, transient=True)
        return
    told = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - told >= LINE_SECONDS:
            print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)
            told = time.monotonic()
        yield item
