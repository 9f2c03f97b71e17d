"""Tokenizing speed, side by side: ``python -m megaresid.benchmark.tokenizing --input FILES``

The same text, cores and machine for all: raw calls of tiktoken and of gigatoken in as many independent processes, with
the text already in memory; the whole job of data_prep from Parquet to verified shards, with each of the two; and the
ways of llm.c and nanoGPT from Parquet to their files. All take turns, each round beginning with another one. With
``--workers 1`` everything, the parent process too, has one core to itself, and so on.
"""

import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from megaresid.benchmark.outputs import check_outputs, make_folders
from megaresid.benchmark.tokenizing_report import draw, print_table, summarise
from megaresid.benchmark.tokenizing_ways import WAYS, Measurement, raw_texts
from megaresid.errors import UserError, exits_with_user_errors

SCHEMA = 1
# What a way needs that may not be installed, and how to get it.
NEEDS = {
    "raw gigatoken": ("gigatoken", "install the extra [fast]"),
    "megaresid, gigatoken": ("gigatoken", "install the extra [fast]"),
    "nanoGPT": ("datasets", "pip install datasets"),
}


@dataclass(frozen=True)
class Request:
    """MB/s of text of data_prep, of raw tiktoken and gigatoken, and of llm.c's and nanoGPT's ways, in one run."""

    input: tuple[str, ...]
    """Parquet files with a column text."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of processes, each with as many cores."""
    rounds: int = 3
    """How often each way is measured."""
    json: Path | None = None
    """Write everything measured to this new file."""
    plot: Path | None = None
    """Draw the speeds into this new file (.png, .svg or .pdf)."""

    def check(self) -> None:
        """Raises UserError for what cannot be measured or kept."""
        if self.rounds < 1:
            raise UserError(f"--rounds {self.rounds}: must be at least 1")
        cores = len(os.sched_getaffinity(0))
        for workers in self.workers:
            if not 1 <= workers <= cores:
                raise UserError(f"--workers {workers}: must be from 1 to {cores}, the cores that there are here")
        for file in self.input:
            if not Path(file).is_file():
                raise UserError(f"--input {file}: no such file; name Parquet files with a column text")
        check_outputs(self.json, self.plot)


def ways() -> list[str]:
    """Those that can be measured here; says of the others what they need."""
    found = []
    for way in WAYS:
        package, mend = NEEDS.get(way, (None, None))
        if package and importlib.util.find_spec(package) is None:
            print(f"{way}: left out, {package} is not installed: {mend}")
        else:
            found.append(way)
    return found


@contextmanager
def on_cores(number: int) -> Iterator[None]:
    """Processes that are started inside have the first so many cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:number])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def size_of(files: tuple[str, ...]) -> tuple[int, int]:
    """Documents, and their bytes in UTF-8; the files are in the page cache then."""
    documents = size = 0
    for text in raw_texts(files):
        documents += 1
        size += len(text)
    return documents, size


def measure(request: Request, chosen: list[str]) -> dict[tuple[str, int], list[Measurement]]:
    """Every way with every number of workers in each round; UserError where two count another number of ids."""
    visits = [(way, workers) for workers in request.workers for way in chosen]
    found: dict[tuple[str, int], list[Measurement]] = {visit: [] for visit in visits}
    for number in range(request.rounds):
        start = number * len(visits) // request.rounds
        for way, workers in [*visits[start:], *visits[:start]]:
            with tempfile.TemporaryDirectory(prefix="megaresid-benchmark-") as folder, on_cores(workers):
                measured = WAYS[way](list(request.input), Path(folder), workers)
            found[way, workers].append(measured)
            print(
                f"round {number + 1}/{request.rounds}  {way:22} {workers} worker(s)  {measured.seconds:8.2f} s",
                flush=True,
            )
    counts = {measured.tokens for several in found.values() for measured in several}
    if len(counts) > 1:
        raise UserError(f"the ways made different numbers of ids: {found}")
    return found


def main(request: Request) -> None:
    request.check()
    chosen = ways()
    make_folders(request.json, request.plot)
    documents, size = size_of(request.input)
    described = f"{documents:,} documents, {size / 1e6:,.0f} MB of text in {len(request.input)} Parquet file(s)"
    print(described, flush=True)
    rows = summarise(measure(request, chosen), size)
    print_table(rows)
    if request.json is not None:
        keep(request, rows, documents, size)
    if request.plot is not None:
        draw(rows, request.plot, described)


def keep(request: Request, rows: list[dict[str, Any]], documents: int, size: int) -> None:
    """Write what was measured, with what it was measured on."""
    from megaresid.training.run_dir import environment, write_json

    options = {"input": [Path(file).name for file in request.input], "workers": request.workers}
    text = {"documents": documents, "bytes": size}
    write_json(
        request.json,
        {
            "schema": SCHEMA,
            "options": {**options, "rounds": request.rounds},
            "text": text,
            "environment": json.loads(json.dumps(environment())),
            "ways": rows,
        },
    )


if __name__ == "__main__":
    exits_with_user_errors(lambda: main(tyro.cli(Request, prog="python -m megaresid.benchmark.tokenizing")))()
