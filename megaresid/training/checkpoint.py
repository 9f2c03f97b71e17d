"""Checkpoints that any ZeRO stage and rank count can load: saving, finding and loading, by all ranks together.

DeepSpeed's own are bound to the stage and the ranks that wrote them, and are pickles. Here every rank writes the runs
of elements that it holds, and loading is slicing; nothing is unpickled. A checkpoint is complete or it does not exist.
Hyperparameters of the optimizer (learning rate, ...) are not in it: they are functions of the step and configuration.
"""

import base64
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaresid.errors import UserError, suggestion
from megaresid.training.agreement import CheckpointError, DamagedCheckpoint, Ranks, agreed
from megaresid.training.checkpoint_format import (
    ASIDE,
    FOLDER,
    HEADER,
    MARKER,
    SavedState,
    check_hashes,
    checkpoints_in,
    complete_files,
    iterate_parameters,
    read_parameters,
    step_of,
)
from megaresid.training.retention import Retention
from megaresid.training.saver import merged, remove_outdated, write_checkpoint
from megaresid.training.snapshot import ENGINE_COUNTERS, shapes_of, take_snapshot
from megaresid.training.zero_state import live_state
from megaresid.training.zero_state.live import PARAMETER, LiveState

__all__ = [
    "CheckpointError",
    "CheckpointState",
    "DamagedCheckpoint",
    "agreed",
    "check_shapes",
    "copy_parameters",
    "find_checkpoint",
    "iterate_parameters",
    "load_checkpoint",
    "load_newest",
    "read_parameters",
    "save_checkpoint",
    "shapes_of",
]


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
    retention: Retention = Retention(),
) -> Path:
    """Write ``checkpoints_dir/step_00000200`` from a DeepSpeed engine between two steps, and return its path when it is
    written (``Saver`` does so in the background).

    Every rank calls it. ``parameters`` are the live ones by canonical name; ``counters`` and ``identity`` (JSON
    values, rank 0's are kept) come back from ``load_checkpoint``. Raises what ``write_checkpoint`` raises.
    """
    ranks = Ranks()
    try:
        part = take_snapshot(
            engine, parameters, ranks.rank, ranks.count, step=step, counters=counters, identity=identity
        )
    except Exception as error:  # raised with all ranks together
        part = error
    path = write_checkpoint(ranks, step, part, checkpoints_dir, retention)
    remove_outdated(ranks, checkpoints_dir, retention)
    return path


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
        header = saved.header
        with agreed(what):
            live.owned_scalars(saved)
            for name in ENGINE_COUNTERS:
                if name not in header.engine:
                    raise UserError(f"{path / HEADER}: engine lacks {name}; use another checkpoint")
            generators = {}
            if header.world_size == ranks:
                generators = _generator_states(path / HEADER, header.generators[rank])
        with agreed(what):
            live.restore_parameters(lambda name, offset, out: saved.read(PARAMETER, name, offset, out))
            live.restore_optimizer(saved)
        live.publish()
    with agreed(what):
        for name in ENGINE_COUNTERS:
            setattr(engine, name, header.engine[name])
        # Counted anew, since another rank count may accumulate over another number of micro-batches.
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        _set_generator_states(generators)
    return CheckpointState(header.step, header.counters, header.identity, header.world_size)


def load_newest(
    engine, parameters: Mapping[str, nn.Parameter], newest: Path
) -> tuple[CheckpointState, Path, list[str]]:
    """``load_checkpoint`` of ``newest`` or, where files of it are damaged, of the newest before it that is whole.

    Also returns that one's path, and what is wrong with each that was damaged. Those are given a name that is no
    checkpoint's, ``damaged_step_00000200``, so that the run can save those steps again. Every rank calls it. Raises as
    ``load_checkpoint`` does, for damage where no checkpoint is whole; then they all keep their names.
    """
    path, damaged = newest, []
    while True:
        try:
            state = load_checkpoint(engine, parameters, path)
            break
        except DamagedCheckpoint as damage:
            damaged.append((path, str(damage)))
            older = [None]
            if dist.get_rank() == 0:
                older = [one for one in checkpoints_in(path.parent) if step_of(one) < step_of(path)][-1:] or older
            dist.broadcast_object_list(older, src=0)
            if older[0] is None:
                raise
            path = older[0]
    with agreed(f"damaged checkpoints of {newest.parent}"):
        if dist.get_rank() == 0:
            for one, _ in damaged:
                aside = one.with_name(f"damaged_{one.name}")
                if aside.exists():
                    shutil.rmtree(aside)  # of an earlier time that this step was damaged
                os.rename(one, aside)
    return state, path, [problem for _, problem in damaged]


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
    shapes = merged(Ranks().gathered(shapes))
    with agreed(what):
        saved = SavedState(path)
        check_shapes(str(path), saved.header.parameters, shapes)
    return live, saved


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


def _generator_states(source: Path, states: Mapping[str, str]) -> dict[str, Tensor]:
    """A rank's generator states by device, uint8; ``UserError`` for one that no generator of this machine takes."""
    if "cpu" not in states:
        raise UserError(f"{source}: generators lack cpu; use another checkpoint")
    found = {}
    for device, text in states.items():
        if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            continue
        try:
            found[device] = torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8)
            torch.Generator(device).set_state(found[device])
        except (ValueError, RuntimeError):
            raise UserError(f"{source}: generators: {device} is no state of one; use another checkpoint") from None
    return found


def _set_generator_states(states: Mapping[str, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state)
