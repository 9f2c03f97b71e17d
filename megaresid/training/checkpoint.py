"""Checkpoints that any ZeRO stage and rank count can load: saving, finding and loading, by all ranks together.

DeepSpeed's own are bound to the stage and the ranks that wrote them, and are pickles. Here every rank writes the runs
of elements that it holds, and loading is slicing; nothing is unpickled. A checkpoint is complete or it does not exist.
Hyperparameters of the optimizer (learning rate, ...) are not in it: they are functions of the step and configuration.
"""

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaresid.errors import UserError, suggestion
from megaresid.training.checkpoint_format import (
    ASIDE,
    FOLDER,
    HEADER,
    LATEST,
    MARKER,
    FileRecord,
    Header,
    Marker,
    SavedState,
    check_hashes,
    checkpoints_in,
    complete_files,
    is_complete,
    iterate_parameters,
    move_into_place,
    rank_file,
    read_parameters,
    step_dir,
    write_record,
    write_tensors,
)
from megaresid.training.zero_state import live_state
from megaresid.training.zero_state.live import PARAMETER, LiveState

__all__ = [
    "CheckpointError",
    "CheckpointState",
    "agreed",
    "check_shapes",
    "copy_parameters",
    "find_checkpoint",
    "iterate_parameters",
    "load_checkpoint",
    "read_parameters",
    "save_checkpoint",
    "shapes_of",
]

ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class CheckpointError(Exception):
    """A fault on some rank (a full disk, a folder it cannot see) that ended a save or load on all of them."""


@dataclass(frozen=True)
class CheckpointState:
    """What the caller of ``load_checkpoint`` continues from; the dictionaries are those given when it was saved."""

    step: int
    counters: dict[str, Any]
    identity: dict[str, Any]
    world_size: int


def save_checkpoint(
    engine,
    parameters: Mapping[str, nn.Parameter],
    checkpoints_dir: Path,
    *,
    step: int,
    counters: dict[str, Any],
    identity: dict[str, Any],
    keep: int | None = None,
) -> Path:
    """Write ``checkpoints_dir/step_00000200`` from a DeepSpeed engine between two steps, and return its path.

    Every rank calls it. ``parameters`` are the live ones by canonical name; ``counters`` and ``identity`` (JSON
    values, rank 0's are kept) come back from ``load_checkpoint``. ``keep`` removes all but the newest so many complete
    checkpoints afterwards, never the one that ``latest`` names. Raises ``UserError`` for a step that is there already,
    ``CheckpointError`` for a fault while writing; the checkpoints that were there stay as they were.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    target, aside = checkpoints_dir / step_dir(step), checkpoints_dir / (ASIDE + step_dir(step))
    what = f"checkpoint {target}"
    try:
        with agreed(what):
            if keep is not None and keep < 1:
                raise UserError(f"checkpoints to keep: {keep}; keep at least 1")
            if engine.micro_steps % engine.gradient_accumulation_steps():
                raise ValueError("between two micro-batches of a step: the gradients so far would be lost")
            json.dumps([counters, identity])
            live = live_state(engine, parameters)
            tensors, runs = _written(live, rank, ranks)
            if rank == 0:
                _make_room(checkpoints_dir, target)
                aside.mkdir()
        with agreed(what):
            record = write_tensors(aside / rank_file(rank), tensors, runs)
            part = record, shapes_of(parameters), live.scalars(), _generator_states()
        parts = _gathered(part)
        with agreed(what):
            if rank == 0:
                records, shapes, scalars, generators = zip(*parts)
                header = Header(
                    step=step,
                    world_size=ranks,
                    parameters=_merged(shapes),
                    scalars=_merged(scalars),
                    counters=counters,
                    engine={name: getattr(engine, name) for name in ENGINE_COUNTERS},
                    generators=generators,
                    identity=identity,
                )
                _complete(aside, header, records)
                move_into_place(aside, target)
    except (CheckpointError, UserError):
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if keep is not None:
        with agreed(f"old checkpoints of {checkpoints_dir}"):
            if rank == 0:
                _retain(checkpoints_dir, keep)
    return target


def find_checkpoint(path: Path) -> Path | None:
    """The newest complete checkpoint of a run directory (None if it has none), or ``path`` itself if it is one.

    Incomplete ones are passed over in a run directory; named themselves, they are a ``UserError`` that names the file
    that is missing or has another size than was written. Hashes are checked by what loads or reads it.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such run directory or checkpoint")
    is_one = re.fullmatch(rf"({re.escape(ASIDE)})?step_\d+", path.name)
    if is_one or (path / HEADER).exists() or (path / MARKER).exists():
        complete_files(path)
        return path
    found = checkpoints_in(path if path.name == FOLDER else path / FOLDER)
    return found[-1] if found else None


def load_checkpoint(engine, parameters: Mapping[str, nn.Parameter], path: Path) -> CheckpointState:
    """Restore an engine from a checkpoint of any ZeRO stage and rank count: parameters, optimizer state, the engine's
    counters and, on as many ranks as wrote it, each rank's generators, last.

    Every rank calls it, between two steps. Raises ``UserError`` on all of them, before anything is changed, for a
    damaged checkpoint, for parameters with other names or shapes, or for a state that this stage cannot hold.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    what = f"checkpoint {path}"
    live, saved = _opened(engine, parameters, path)
    with saved:
        with agreed(what):
            live.owned_scalars(saved)
        with agreed(what):
            live.restore_parameters(lambda name, offset, out: saved.read(PARAMETER, name, offset, out))
            live.restore_optimizer(saved)
        live.publish()
        header = saved.header
    with agreed(what):
        for name in ENGINE_COUNTERS:
            setattr(engine, name, header.engine[name])
        # Counted anew, since another rank count may accumulate over another number of micro-batches.
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        if header.world_size == ranks:
            _set_generator_states(header.generators[rank])
    return CheckpointState(header.step, header.counters, header.identity, header.world_size)


def copy_parameters(engine, parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Set an engine's parameters, under any ZeRO stage, to those of a checkpoint; all else stays as it is.

    Every rank calls it, and reads the runs of elements that it holds. Raises ``UserError`` on all of them, before
    anything is changed, for a damaged checkpoint or for parameters with other names or shapes.
    """
    live, saved = _opened(engine, parameters, path)
    with saved:
        with agreed(f"checkpoint {path}"):
            live.restore_parameters(lambda name, offset, out: saved.read(PARAMETER, name, offset, out))
        live.publish()


def _opened(engine, parameters: Mapping[str, nn.Parameter], path: Path) -> tuple[LiveState, SavedState]:
    """An engine's state, and the checkpoint of parameters with the same names and shapes; each rank hashes its share
    of the files."""
    what = f"checkpoint {path}"
    with agreed(what):
        live, shapes = live_state(engine, parameters), shapes_of(parameters)
        files = complete_files(path)
        check_hashes(path, files, sorted(files)[dist.get_rank() :: dist.get_world_size()])
    shapes = _merged(_gathered(shapes))
    with agreed(what):
        saved = SavedState(path)
        check_shapes(str(path), saved.header.parameters, shapes)
    return live, saved


def _written(
    live: LiveState, rank: int, ranks: int
) -> tuple[dict[tuple[str, str], Tensor], dict[str, tuple[int, int]]]:
    """The flat tensors of this rank's file by (kind, name), and the (offset, length) of each name."""
    tensors, runs = {}, {}
    for kind, fragment, elements in live.tensors(rank, ranks):
        tensors[kind, fragment.name] = elements
        runs[fragment.name] = fragment.offset, fragment.length
    return tensors, runs


def _make_room(folder: Path, target: Path) -> None:
    """Remove what earlier saves left unfinished, and a damaged checkpoint of the same step."""
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if is_complete(target):
            raise UserError(f"{target} is there already and is not overwritten: resume from it, or move it away")
        os.rename(target, folder / (ASIDE + "damaged-" + target.name))
    for leftover in folder.glob(ASIDE + "*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _complete(aside: Path, header: Header, records: tuple[FileRecord, ...]) -> None:
    """Write the header and then, once every rank's file is seen from here in its size, the marker."""
    files = {rank_file(rank): record for rank, record in enumerate(records)}
    files[HEADER] = write_record(aside / HEADER, header)
    for name, record in files.items():
        if (aside / name).stat().st_size != record.size:
            raise OSError(f"{aside / name} has not the {record.size} bytes that were written")
    write_record(aside / MARKER, Marker(files=files))


def _retain(folder: Path, keep: int) -> None:
    latest = (folder / LATEST).read_text(encoding="utf-8").strip()
    for old in checkpoints_in(folder)[:-keep]:
        if old.name != latest:
            # Renamed first: a removal that is interrupted leaves nothing that has a checkpoint's name.
            gone = old.rename(folder / (ASIDE + "old-" + old.name))
            shutil.rmtree(gone, ignore_errors=True)


def shapes_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[int]]:
    """Full shapes; ZeRO-3 leaves an empty tensor in the module and keeps the shape aside."""
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters.items()}


def check_shapes(source: str, saved: Mapping[str, list[int]], live: Mapping[str, list[int]]) -> None:
    """Raise ``UserError`` where two sets of parameters, by canonical name, differ in a name or a shape."""
    for name in live:
        if name not in saved:
            raise UserError(f"{source}: it lacks parameter {name} of this model; {suggestion(name, saved)}")
    for name, shape in saved.items():
        if name not in live:
            raise UserError(f"{source}: it has parameter {name}, which this model lacks; {suggestion(name, live)}")
        if live[name] != shape:
            raise UserError(f"{source}: {name} has shape {shape} there and {live[name]} here; give the model it was of")


def _generator_states() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def _set_generator_states(states: Mapping[str, str]) -> None:
    for device, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


def _gathered(mine: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, mine)
    return values


def _merged(parts: Any) -> dict:
    merged: dict = {}
    for part in parts:
        merged.update(part)
    return merged


@contextmanager
def agreed(what: str) -> Iterator[None]:
    """A stretch of work without collectives whose failure on any rank is raised on every rank."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    mine = None if failure is None else (isinstance(failure, UserError), f"{type(failure).__name__}: {failure}")
    reports = _gathered(mine)
    for rank, report in enumerate(reports):
        if report is None:
            continue
        is_users, text = report
        if is_users:
            raise UserError(text.partition(": ")[2]) from failure
        raise CheckpointError(f"{what}: rank {rank}: {text}") from failure
