"""Ends a run in which a rank hangs, and names the rank.

Every rank counts its beats: micro-batches, forwards, steps, evaluations and saves, which come in the same order on all
of them. A thread of its own writes the count and the place in the program to a file in the run directory, never through
the collectives, in which the others wait. Where a rank's count has stood still for longer than the patience, its thread
reads what the others have written. To blame is a rank whose thread writes no more (a stopped process), else one that
has counted less than another, else one that is not in a collective while another is.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from megaresid.exit_codes import FAULT
from megaresid.training.run_dir import HEARTBEATS
from megaresid.training.supervisor import Report

T = TypeVar("T")
FIRST_STEP = 4
"""How many times the patience a rank has until its first step is made: compilation, the evaluation before it."""
PARTS = 10
"""A file is written so many times within the patience, but not more seldom than every LONGEST seconds."""
LONGEST = 10.0
COLLECTIVES = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")
LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", f"{os.sep}lib{os.sep}python")


class Watchdog:
    """One on every rank, made in its main thread when rank 0 has made the run directory. ``patience`` is in seconds; at
    0 it only tells the supervisor the steps. Use as a context manager.
    """

    def __init__(self, run: Path, rank: int, ranks: int, patience: float, report: Report):
        self._folder, self._rank, self._ranks = run / HEARTBEATS, rank, ranks
        self._patience, self._report = patience, report
        self._beats, self._doing, self._step, self._first = 0, "starting", None, True
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._period = min(LONGEST, patience / PARTS)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._patience > 0:
            self._folder.mkdir(exist_ok=True)
            self._write(0)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()
            self._file(self._rank).unlink(missing_ok=True)
            try:
                self._folder.rmdir()
            except OSError:  # not the last rank
                pass

    def beat(self, doing: str) -> None:
        self._beats += 1
        self._doing = doing

    def follow(self, engine: Any) -> None:
        """Count what an engine is called for."""
        set_step = engine.set_step

        @wraps(engine.train_step)
        def train_step(*args: Any, _train_step: Callable = engine.train_step) -> Any:
            self._report.at(self._step)
            result = _train_step(*args)
            self.beat("training")
            self._first = False
            return result

        def at_step(step: int) -> None:
            self._step = step
            set_step(step)

        engine.set_step, engine.train_step = at_step, train_step
        engine.loss, engine.score = (self.followed(call, "evaluating") for call in (engine.loss, engine.score))

    def followed(self, call: Callable[..., T], doing: str) -> Callable[..., T]:
        @wraps(call)
        def counted(*args: Any, **kwargs: Any) -> T:
            self.beat(doing)
            result = call(*args, **kwargs)
            self.beat(doing)
            return result

        return counted

    def each(self, items: Iterator[T]) -> Iterator[T]:
        """The micro-batches of training: one that has been read is progress."""
        for item in items:
            self.beat("training")
            yield item

    def _watch(self) -> None:
        pulse, counted, since, seen = 0, None, time.monotonic(), None
        while not self._closed.wait(self._period):
            pulse += 1
            self._write(pulse)
            now = time.monotonic()
            if self._beats != counted:
                counted, since, seen = self._beats, now, None
                continue
            patience = self._patience * (FIRST_STEP if self._first else 1)
            # Looked at twice, four periods apart: who has not written between is stopped.
            if seen is None and now - since > patience:
                seen, first_look = self._read(), now
            elif seen is not None and now - first_look > 4 * self._period:
                self._end(seen, self._read(), patience)

    def _end(self, before: dict[int, dict], found: dict[int, dict], patience: float) -> None:
        blamed = to_blame(before, found)
        waiting = [rank for rank in found if rank not in blamed]
        if self._rank == min(waiting, default=0):
            for line in told(blamed, found, patience):
                sys.stderr.write(f"{line}\n")  # at once: of an unbuffered print, the ranks' lines mingle
            sys.stderr.flush()
        else:
            time.sleep(4 * self._period)  # that the one who tells is not cut short by a launcher
        self._report.ends(FAULT)
        os._exit(FAULT)

    def _write(self, pulse: int) -> None:
        content = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "pulse": pulse,
            "beats": self._beats,
            "doing": self._doing,
            "step": self._step,
            **self._place(),
        }
        path = self._file(self._rank)
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(content), encoding="utf-8")
            os.replace(partial, path)
        except OSError:  # a full disk, say: the other ranks will tell
            pass

    def _place(self) -> dict[str, Any]:
        """Where the main thread is: the innermost line outside of libraries, and whether it is in a collective."""
        frame = sys._current_frames().get(self._main)
        place, in_collective = None, False
        while frame is not None and place is None:
            name = frame.f_code.co_filename
            in_collective |= any(part in name for part in COLLECTIVES)
            if not any(part in name for part in LIBRARIES) and not name.startswith("<"):
                place = f"{name}, line {frame.f_lineno}"
            frame = frame.f_back
        return {"place": place, "in_collective": in_collective}

    def _read(self) -> dict[int, dict]:
        found = {}
        for rank in range(self._ranks):
            try:
                found[rank] = json.loads(self._file(rank).read_bytes())
            except (OSError, ValueError):
                found[rank] = {"rank": rank, "host": None, "pulse": None, "beats": -1}
        return found

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}"


def to_blame(before: dict[int, dict], found: dict[int, dict]) -> dict[int, str]:
    """The ranks that the others wait for, each with what is wrong with it; none where all are alike."""
    silent = [rank for rank in found if found[rank]["pulse"] == before[rank]["pulse"]]
    if silent:
        return dict.fromkeys(silent, "has stopped")
    most = max(one["beats"] for one in found.values())
    if behind := [rank for rank in found if found[rank]["beats"] < most]:
        return dict.fromkeys(behind, "has not come")
    away = [rank for rank in found if not found[rank]["in_collective"]]
    return dict.fromkeys(away, "has not come") if len(away) < len(found) else {}


def told(blamed: dict[int, str], found: dict[int, dict], patience: float) -> list[str]:
    """The lines of the message."""
    if not blamed:
        return [
            f"error: no rank has made progress for {patience:g} s: the run ends here; go on with it by --resume auto",
            *(f"  rank {rank} {_known(one)}" for rank, one in found.items()),
        ]
    return [
        f"error: rank {rank} {wrong}, and the others have waited for it for {patience:g} s: {_known(found[rank])}; "
        "the run ends here; go on with it by --resume auto"
        for rank, wrong in blamed.items()
    ]


def _known(one: dict) -> str:
    if one["host"] is None:
        return "nothing is known of it"
    step = "before its first step" if one["step"] is None else f"at step {one['step']}"
    return f"process {one['process']} on {one['host']}, {one['doing']} {step}, in {one['place']}"
