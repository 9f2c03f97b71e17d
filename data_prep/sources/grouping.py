"""Cuts a list of files into units, by the files alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.sources.source import UNIT_BYTES, WHOLE, File, Segment, Share, Unit


def units_of(
    files: list[File],
    fetch: Callable[[File], Path],
    cut: Callable[[File, Path], Iterator[tuple[Segment, int]]],
    share: Share = WHOLE,
) -> Iterator[Unit]:
    """The units of a share, in order.

    Consecutive files smaller than UNIT_BYTES make one unit, until together they reach it. A larger file is cut:
    ``cut`` gives its segments and the bytes of the file that each covers. ``fetch`` gives a file's path on this
    machine, and is called only for files in which a unit of the share can begin.
    """
    total, position = sum(file.bytes for file in files), 0
    for group, run in enumerate(groups(files)):
        size = sum(file.bytes for file in run)
        if size >= UNIT_BYTES and len(run) == 1:
            if share.meets(position, size, total):
                yield from _units_of_large(group, position, run[0], fetch, cut, share, total)
        elif share.has(position, total):
            segments = tuple(Segment(fetch(file), file.name, size=file.bytes) for file in run)
            yield Unit(group, 0, position, size, segments)
        position += size


def groups(files: list[File]) -> Iterator[list[File]]:
    """The files in runs: a large one alone, small ones together."""
    run: list[File] = []
    size = 0
    for file in files:
        if run and file.bytes >= UNIT_BYTES:
            yield run
            run, size = [], 0
        run.append(file)
        size += file.bytes
        if size >= UNIT_BYTES:
            yield run
            run, size = [], 0
    if run:
        yield run


def _units_of_large(group, position, file, fetch, cut, share, total) -> Iterator[Unit]:
    for index, (segment, size) in enumerate(cut(file, fetch(file))):
        if share.has(position, total):
            yield Unit(group, index, position, size, (replace(segment, size=file.bytes),))
        position += size
