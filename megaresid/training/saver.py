"""Saving a checkpoint: the training thread copies this rank's state, another thread writes it.

The threads share no process group. The training thread takes its copy without a collective; what the ranks have to
agree on for a checkpoint they agree on in the writing threads, in a gloo group of their own. One save is written at a
time, so that every rank enters that group's collectives in the same order.
"""

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch import nn

from megaresid.errors import UserError
from megaresid.monitoring.metrics import Recorder
from megaresid.process_groups import own_group
from megaresid.training.agreement import CheckpointError, Ranks
from megaresid.training.checkpoint_format import (
    ASIDE,
    HEADER,
    MARKER,
    FileRecord,
    Header,
    Marker,
    move_into_place,
    rank_file,
    step_dir,
    write_elements,
    write_record,
)
from megaresid.training.retention import OUT_OF_SPACE, Retention, make_room, out_of_space, retain
from megaresid.training.snapshot import Described, Snapshot, take_snapshot
from megaresid.training.zero_state import live_state


class Saver:
    """Saves checkpoints of a DeepSpeed engine to ``folder``. Every rank makes one, and calls its methods alike, but for
    ``tell``; ``recorder`` is rank 0's alone.

    A save that fails is told and counted (from ``failed`` on), and leaves the checkpoints that are there. Raises
    ``UserError`` for an engine whose state cannot be saved. A context manager, which waits at its end for what is being
    written.
    """

    def __init__(
        self,
        engine,
        parameters: Mapping[str, nn.Parameter],
        folder: Path,
        *,
        identity: dict[str, Any],
        retention: Retention,
        recorder: Recorder | None = None,
        failed: int = 0,
    ):
        self._engine, self._parameters, self._identity = engine, parameters, identity
        self._folder, self._retention = folder, retention
        self._ranks = Ranks(own_group("saving"))
        with self._ranks.agreed(f"checkpoints in {folder}"):
            live_state(engine, parameters)
        self._part: Snapshot | Exception | None = None
        self._writing: threading.Thread | None = None
        self._step, self._saved, self._has_waited = 0, True, False
        self._news: SimpleQueue[str] = SimpleQueue()
        self._recorder, self._failed, self._recorded = recorder, failed, failed

    def save(self, step: int, counters: dict[str, Any]) -> None:
        """Copy this rank's part of the state between two steps, and return; ``counters`` are JSON values. Where the
        save before this one is still being written, wait for that first."""
        if self._writing is not None and self._writing.is_alive() and not self._has_waited:
            self._has_waited = True
            self._news.put(f"training waits at step {step} for the checkpoint before to be written: save less often")
        self.finish()
        buffer = self._part.elements if isinstance(self._part, Snapshot) else None
        try:
            self._part = take_snapshot(
                self._engine,
                self._parameters,
                self._ranks.rank,
                self._ranks.count,
                step=step,
                counters=counters | {"failed_saves": self._failed},
                identity=self._identity,
                buffer=buffer,
            )
        except Exception as error:  # the writing threads agree on it: raised here, other ranks would wait for this one
            self._part = error
        self._start(step)

    def finish(self) -> None:
        """Wait until no save is being written."""
        if self._writing is not None:
            self._writing.join()

    def saved(self) -> bool:
        """Wait; whether the newest save succeeded. One that failed is tried once more, from the copy of then."""
        self.finish()
        if not self._saved:
            self._start(self._step)
            self.finish()
        if not self._saved:
            self._news.put(f"error: the weights of step {self._step} are not saved; make room in {self._folder}")
        return self._saved

    def tell(self, step: int) -> None:
        """Say and record what has become of saves since this was last called."""
        if self._recorder is None:
            return
        while not self._news.empty():
            self._recorder.say(self._news.get())
        if self._failed > self._recorded:
            self._recorded = self._failed
            self._recorder.record(step, {"failed_saves": self._failed})

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exception) -> None:
        self.finish()
        self.tell(self._step)

    def _start(self, step: int) -> None:
        self._step, self._saved = step, False
        self._writing = threading.Thread(target=self._write, name=f"writing {step_dir(step)}", daemon=True)
        self._writing.start()

    def _write(self) -> None:
        try:
            write_checkpoint(self._ranks, self._step, self._part, self._folder, self._retention)
            self._saved = True
        except Exception as error:
            self._failed += 1
            self._news.put(f"checkpoint {self._step} was not saved, the next one is tried when it is due: {error}")
            return
        try:
            remove_outdated(self._ranks, self._folder, self._retention)
        except Exception as error:
            self._news.put(f"old checkpoints were not removed: {error}")


def write_checkpoint(
    ranks: Ranks, step: int, part: Snapshot | Exception, folder: Path, retention: Retention
) -> Path:
    """Write ``folder/step_00000200`` from every rank's snapshot, and return its path; an exception in a rank's place is
    why it has none.

    The files are written aside, and are given their name when all of them are there; ``latest`` moves last. Raises
    ``UserError`` for a step that is there already, ``CheckpointError`` for a fault; the checkpoints that were there
    stay as they were, apart from those that had to go for lack of space (see ``make_room``).
    """
    target, aside = folder / step_dir(step), folder / (ASIDE + step_dir(step))
    what = f"checkpoint {target}"
    with ranks.agreed(what):
        if isinstance(part, Exception):
            raise part
    needed = sum(ranks.gathered(len(part.layout.header) + part.layout.size))
    try:
        with ranks.agreed(what):
            if ranks.rank == 0:
                make_room(folder, target, needed, retention)
                aside.mkdir()
        with ranks.agreed(what):
            try:
                record = write_elements(aside / rank_file(ranks.rank), part.layout, part.elements)
            except OSError as error:
                if error.errno in OUT_OF_SPACE:
                    raise OSError(error.errno, out_of_space(folder, needed)) from error
                raise
        written = ranks.gathered((record, part.described))
        with ranks.agreed(what):
            if ranks.rank == 0:
                records, described = zip(*written)
                _complete(aside, _header(part, described), records)
                move_into_place(aside, target)
    except (CheckpointError, UserError):
        if ranks.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def remove_outdated(ranks: Ranks, folder: Path, retention: Retention) -> None:
    """Remove the checkpoints that need not be kept; ``CheckpointError`` where one cannot be removed."""
    with ranks.agreed(f"old checkpoints of {folder}"):
        if ranks.rank == 0:
            retain(folder, retention)


def _header(part: Snapshot, described: tuple[Described, ...]) -> Header:
    return Header(
        step=part.step,
        world_size=len(described),
        parameters=merged(one.shapes for one in described),
        scalars=merged(one.scalars for one in described),
        counters=part.counters,
        engine=part.engine,
        generators=[one.generators for one in described],
        identity=part.identity,
    )


def _complete(aside: Path, header: Header, records: tuple[FileRecord, ...]) -> None:
    """Write the header and then, once every rank's file is seen from here in its size, the marker."""
    files = {rank_file(rank): record for rank, record in enumerate(records)}
    files[HEADER] = write_record(aside / HEADER, header)
    for name, record in files.items():
        if (aside / name).stat().st_size != record.size:
            raise OSError(f"{aside / name} has not the {record.size} bytes that were written")
    write_record(aside / MARKER, Marker(files=files))


def merged(parts) -> dict:
    """One dictionary of several."""
    return {key: value for part in parts for key, value in part.items()}
