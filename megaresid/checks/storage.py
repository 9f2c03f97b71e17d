"""The disk of a run directory: whether it can be written and locked, its room for checkpoints, and its speed."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from megaresid.checks.finding import Finding, fault, ok, warning
from megaresid.config import RunConfig, from_flat, read_object
from megaresid.errors import UserError
from megaresid.model.presets import ModelShape

PIECE, MOST, SECONDS = 4 * 2**20, 64 * 2**20, 3.0
"""What is written to measure the speed: pieces, until so many bytes or seconds."""

STATES = 3  # fp32 numbers a parameter: itself and the Adam family's two
SLOW = 50e6  # bytes per second


def checkpoint_bytes(shape: ModelShape) -> int:
    """About what a checkpoint of this shape takes: vanilla's parameters, with the Adam family's states."""
    width = shape.width
    parameters = (shape.padded_vocab_size + shape.context) * width + shape.layers * 12 * width * width
    return 4 * STATES * parameters


def storage(run_dir: Path) -> Iterator[Finding]:
    """Of a run directory that is there, or of the folder in which it would be made."""
    if run_dir.exists() and not run_dir.is_dir():
        yield fault("run directory", f"{run_dir} is a file", "name a folder")
        return
    folder = run_dir.absolute()
    while not folder.is_dir():
        folder = folder.parent
    probe = folder / f".megaresid-check-{os.getpid()}"
    try:
        speed = _speed(probe)
    except OSError as error:
        yield fault("run directory", f"{folder} cannot be written ({error.strerror})", "mend that, or choose another")
        return
    finally:
        probe.unlink(missing_ok=True)
    config = RunConfig()
    if (run_dir / "config.json").exists():
        try:
            config = from_flat(read_object(run_dir / "config.json", "--run-dir"), str(run_dir / "config.json"))
        except UserError as error:
            yield fault("run directory", str(error), "")
    yield from room(run_dir, shutil.disk_usage(folder).free, config)
    size = checkpoint_bytes(config.shape)
    words = f"{speed / 1e6:,.0f} MB/s written and synced, a checkpoint in about {size / speed:,.0f} s"
    if speed < SLOW:
        yield warning("disk speed", words, "choose a faster disk, or save more rarely by --checkpoint-interval")
    else:
        yield ok("disk speed", words)


def room(run_dir: Path, free: int, config: RunConfig) -> Iterator[Finding]:
    """Whether the checkpoints that are kept, and the one that is written, have room."""
    keep, size = config.interval.keep_checkpoints, checkpoint_bytes(config.shape)
    there = [path for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir()]
    sizes = [sum(file.stat().st_size for file in path.iterdir() if file.is_file()) for path in there]
    size = max(sizes, default=size)
    needed = size * max(1, (keep or 2) + 1 - len(there))
    words = f"{free / 2**30:,.1f} GiB free in {run_dir}, a checkpoint of {config.model.model} is {size / 2**30:,.2f}"
    if free < size:
        yield fault("disk", words, "make room, or choose another --run-dir")
    elif free < needed:
        yield warning("disk", f"{words}, {keep or 'all'} are kept", "make room, or lower --keep-checkpoints")
    else:
        yield ok("disk", words)


def _speed(probe: Path) -> float:
    """Bytes per second, written and synced. Raises OSError, of a folder whose files cannot be locked too."""
    piece, written, start = os.urandom(PIECE), 0, time.perf_counter()
    with open(probe, "wb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        while written < MOST and time.perf_counter() - start < SECONDS:
            written += file.write(piece)
            os.fsync(file.fileno())
    return written / (time.perf_counter() - start)
