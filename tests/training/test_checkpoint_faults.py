"""Faults while saving: what was there stays the newest, nothing half-written is taken for a checkpoint."""

import errno
import functools
import hashlib
import importlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engines import equal, full_state, make_engine, train

from megaresid.errors import UserError
from megaresid.training import checkpoint_format, saver
from megaresid.training.checkpoint import (
    CheckpointError,
    copy_parameters,
    find_checkpoint,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from megaresid.training.retention import Retention


def save_steps(folder, steps, newest=0):
    engine, parameters = make_engine(1)
    for step in steps:
        retention = Retention(newest)
        save_checkpoint(engine, parameters, folder, step=step, counters={}, identity={}, retention=retention)
    engine.destroy()


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def save_with_a_full_disk_on_rank_1(folder):
    engine, parameters = make_engine(1)

    def full(path, layout, elements):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    write = saver.write_elements
    saver.write_elements = full if dist.get_rank() == 1 else write
    try:
        save_checkpoint(engine, parameters, folder, step=2, counters={}, identity={})
    except CheckpointError as error:
        return str(error)
    finally:
        saver.write_elements = write
        engine.destroy()


def test_a_full_disk_on_one_rank_fails_on_all_and_leaves_the_old(ranks2, tmp_path):
    folder = tmp_path / "checkpoints"
    ranks2.run(save_steps, folder, [1])
    for message in ranks2.run(save_with_a_full_disk_on_rank_1, folder):
        assert "step_00000002: rank 1: OSError" in message and "No space left" in message
    assert names(folder) == {"step_00000001", "latest"}
    assert find_checkpoint(tmp_path) == folder / "step_00000001"
    assert (folder / "latest").read_text() == "step_00000001\n"


class Killed(BaseException):
    """Ends a save where a kill would, past every handler of errors."""


def save_until(folder, step, function, calls):
    """Save, dying at the call number ``calls`` of the ``os`` function that moves things into place."""
    engine, parameters = make_engine(1)
    original, seen = getattr(os, function), []

    def deadly(*args):
        seen.append(args)
        if len(seen) == calls:
            raise Killed
        return original(*args)

    setattr(checkpoint_format.os, function, deadly)
    try:
        save_checkpoint(engine, parameters, folder, step=step, counters={}, identity={})
    except Killed:
        return True
    finally:
        setattr(checkpoint_format.os, function, original)
        engine.destroy()
    return False


def test_a_kill_before_the_rename_leaves_the_old_and_the_next_save_cleans_up(ranks1, tmp_path):
    folder = tmp_path / "checkpoints"
    ranks1.run(save_steps, folder, [1])
    assert ranks1.run(save_until, folder, 2, "rename", 1) == [True]
    assert names(folder) == {"step_00000001", "latest", ".tmp-step_00000002"}
    assert find_checkpoint(tmp_path) == folder / "step_00000001"
    ranks1.run(save_steps, folder, [2])
    assert names(folder) == {"step_00000001", "step_00000002", "latest"}
    assert find_checkpoint(tmp_path) == folder / "step_00000002"


def test_a_kill_before_latest_moves_leaves_the_new_checkpoint_the_newest(ranks1, tmp_path):
    folder = tmp_path / "checkpoints"
    ranks1.run(save_steps, folder, [1])
    assert ranks1.run(save_until, folder, 2, "replace", 1) == [True]
    assert (folder / "latest").read_text() == "step_00000001\n"
    assert find_checkpoint(tmp_path) == folder / "step_00000002"
    assert find_checkpoint(folder / "step_00000002") == folder / "step_00000002"


def test_a_step_that_is_there_is_not_overwritten_unless_it_is_damaged(ranks2, tmp_path):
    folder = tmp_path / "checkpoints"
    ranks2.run(save_steps, folder, [1])
    written = (folder / "step_00000001" / "complete.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="step_00000001 is there already"):
        ranks2.run(save_steps, folder, [1])
    assert (folder / "step_00000001" / "complete.json").stat().st_mtime_ns == written
    (folder / "step_00000001" / "rank_00001.safetensors").unlink()
    assert find_checkpoint(tmp_path) is None
    ranks2.run(save_steps, folder, [1])
    assert names(folder) == {"step_00000001", "latest"}
    assert find_checkpoint(tmp_path) == folder / "step_00000001"


def test_only_the_newest_are_kept_and_always_what_latest_names(ranks1, tmp_path):
    folder = tmp_path / "checkpoints"
    ranks1.run(save_steps, folder, [1, 2, 3, 4])
    ranks1.run(save_steps, folder, [5], 2)
    assert names(folder) == {"step_00000004", "step_00000005", "latest"}
    ranks1.run(save_steps, folder, [3], 1)  # a run that was taken up again from an older step
    assert names(folder) == {"step_00000003", "step_00000005", "latest"}
    assert (folder / "latest").read_text() == "step_00000003\n"
    ranks1.run(save_steps, folder, [6, 7], 0)
    assert names(folder) == {"step_00000003", "step_00000005", "step_00000006", "step_00000007", "latest"}


def save_with(folder, micro_batches, counters):
    """Save after so many micro-batches of a step that has two."""
    engine, parameters = make_engine(1, accumulation=2)
    train(engine, range(1))
    engine.micro_steps += micro_batches
    try:
        save_checkpoint(engine, parameters, folder, step=1, counters=counters, identity={})
    finally:
        engine.destroy()


@pytest.mark.parametrize("micro_batches, counters, message", [(1, {}, "micro-batches"), (0, {"a": object()}, "JSON")])
def test_what_cannot_be_saved_is_refused_before_anything_is_written(ranks1, tmp_path, micro_batches, counters, message):
    with pytest.raises(CheckpointError, match=message):
        ranks1.run(save_with, tmp_path / "checkpoints", micro_batches, counters)
    assert not (tmp_path / "checkpoints").exists()


FAULTS_OF_SAVING = [
    ("saver.write_elements", 1),
    ("snapshot.shapes_of", 1),
    ("snapshot._generator_states", 1),
    ("checkpoint.take_snapshot", 1),
    ("saver.make_room", 0),
    ("saver._complete", 0),
    ("saver.move_into_place", 0),
    ("saver.retain", 0),
]
FAULTS_OF_OPENING = [
    f"checkpoint.{name}" for name in ("check_hashes", "SavedState", "SavedState.read", "check_shapes", "shapes_of")
]
FAULTS_OF_LOADING = [
    pytest.param(load, name, rank, marks=[] if rank else [pytest.mark.full])
    for load, names in [
        (load_checkpoint, [*FAULTS_OF_OPENING, "checkpoint._set_generator_states"]),
        (copy_parameters, FAULTS_OF_OPENING),
    ]
    for name in names
    for rank in (0, 1)
]


def with_a_fault(name, rank, act) -> str | None:
    """What ``act()`` raises on this rank when the function ``name`` fails on the rank ``rank`` alone."""
    module, *owners, name = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(f"megaresid.training.{module}"))
    original = getattr(owner, name)

    def fails(*args, **options):
        raise OSError(errno.EIO, "Input/output error")

    if dist.get_rank() == rank:
        setattr(owner, name, fails)
    try:
        act()
    except CheckpointError as error:
        return str(error)
    else:
        return None
    finally:
        setattr(owner, name, original)


def save_with_a_fault(folder, name, rank):
    engine, parameters = make_engine(2)
    message = with_a_fault(
        name,
        rank,
        lambda: save_checkpoint(engine, parameters, folder, step=2, counters={}, identity={}, retention=Retention(1)),
    )
    engine.destroy()
    return message


@pytest.mark.parametrize("name, rank", FAULTS_OF_SAVING)
def test_a_fault_of_one_rank_in_a_save_is_an_error_on_all(ranks2, tmp_path, name, rank):
    for message in ranks2.run(save_with_a_fault, tmp_path / "checkpoints", name, rank, timeout=60):
        assert f"rank {rank}: OSError" in message and "Input/output error" in message


def load_with_a_fault(folder, load, name, rank):
    engine, parameters = make_engine(3)
    path = save_checkpoint(engine, parameters, folder, step=1, counters={}, identity={})
    message = with_a_fault(name, rank, lambda: load(engine, parameters, path))
    engine.destroy()
    return message


@pytest.mark.parametrize("load, name, rank", FAULTS_OF_LOADING)
def test_a_fault_of_one_rank_in_a_load_is_an_error_on_all(ranks2, tmp_path, load, name, rank):
    for message in ranks2.run(load_with_a_fault, tmp_path / "checkpoints", load, name, rank, timeout=60):
        assert f"step_00000001: rank {rank}: OSError" in message and "Input/output error" in message


def load_and_list_what_is_hashed(folder, load):
    engine, parameters = make_engine(1)
    path = save_checkpoint(engine, parameters, folder, step=1, counters={}, identity={})
    original, hashed = hashlib.file_digest, []
    hashlib.file_digest = lambda file, name: hashed.append(Path(file.name).name) or original(file, name)
    try:
        load(engine, parameters, find_checkpoint(path))
    finally:
        hashlib.file_digest = original
        engine.destroy()
    return hashed


@pytest.mark.parametrize("load", [load_checkpoint, copy_parameters])
def test_finding_and_loading_hash_each_large_file_once_shared_over_the_ranks(ranks2, tmp_path, load):
    shares = ranks2.run(load_and_list_what_is_hashed, tmp_path / "checkpoints", load)
    large = [[name for name in share if name != "checkpoint.json"] for share in shares]
    assert all(large) and sorted(sum(large, [])) == ["rank_00000.safetensors", "rank_00001.safetensors"]


def load_with_a_flipped_bit(folder, load, at):
    engine, parameters = make_engine(1)
    path = save_checkpoint(engine, parameters, folder, step=1, counters={}, identity={})
    train(engine, range(1))
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    dist.barrier()
    if dist.get_rank() == 0:
        damaged = bytearray((path / "rank_00001.safetensors").read_bytes())
        damaged[at] ^= 1
        (path / "rank_00001.safetensors").write_bytes(damaged)
    dist.barrier()
    try:
        load(engine, parameters, path)
    finally:
        assert all(parameter.equal(before[name]) for name, parameter in parameters.items())
        engine.destroy()


@pytest.mark.parametrize("at", [-1, 12], ids=["value", "header"])
@pytest.mark.parametrize("load", [load_checkpoint, copy_parameters])
def test_loading_a_damaged_file_is_an_error_on_all_ranks_and_changes_nothing(ranks2, tmp_path, load, at):
    with pytest.raises(UserError, match="rank_00001.safetensors: the SHA-256"):
        ranks2.run(load_with_a_flipped_bit, tmp_path / "checkpoints", load, at)


def load_with_another_header(folder, change, value):
    """The marker agrees with the header: what is wrong is what was written."""
    engine, parameters = make_engine(1)
    train(engine, range(1))
    path = save_checkpoint(engine, parameters, folder, step=1, counters={}, identity={})
    train(engine, range(1))
    before = full_state(engine, parameters), engine.global_steps, engine.micro_steps, torch.get_rng_state()
    dist.barrier()
    if dist.get_rank() == 0:
        header, marker = (json.loads((path / name).read_text()) for name in ("checkpoint.json", "complete.json"))
        change(header, value)
        written = json.dumps(header).encode()
        (path / "checkpoint.json").write_bytes(written)
        marker["files"]["checkpoint.json"] = {"size": len(written), "sha256": hashlib.sha256(written).hexdigest()}
        (path / "complete.json").write_text(json.dumps(marker))
    dist.barrier()
    try:
        load_checkpoint(engine, parameters, path)
    finally:
        assert equal(full_state(engine, parameters), before[0])
        assert (engine.global_steps, engine.micro_steps) == before[1:3]
        assert torch.equal(torch.get_rng_state(), before[3])
        engine.destroy()


def without_a_counter(header, name):
    del header["engine"][name]


def with_a_counter(header, number):
    header["engine"]["global_steps"] = number


def with_generator_of_rank_1(header, states):
    header["generators"][1] = states


@pytest.mark.parametrize(
    "change, value, message",
    [
        *((without_a_counter, name, f"engine lacks {name}") for name in ("global_steps", "global_samples")),
        (without_a_counter, "skipped_steps", "engine lacks skipped_steps"),
        (with_a_counter, -1, "engine.global_steps: Input should be greater than or equal to 0"),
        (with_generator_of_rank_1, {}, "generators lack cpu"),
        (with_generator_of_rank_1, {"cpu": "AAAA"}, "generators: cpu is no state"),
        (with_generator_of_rank_1, {"cpu": "AAA"}, "generators: cpu is no state"),
        (with_generator_of_rank_1, {"cpu": "\u00e9"}, "generators: cpu is no state"),
    ],
)
def test_a_header_without_all_that_a_resume_needs_is_refused_before_anything_changes(
    ranks2, tmp_path, change, value, message
):
    with pytest.raises(UserError, match=f"step_00000001/checkpoint.json: {message}"):
        ranks2.run(load_with_another_header, tmp_path / "checkpoints", change, value)


def save_damage_and_load_newest(folder, damaged, name, at):
    """Saves steps 1 to 3, flips a bit of ``name`` in each of ``damaged``, and loads the newest that is whole."""
    engine, parameters = make_engine(1)
    for step in (1, 2, 3):
        train(engine, range(1))
        save_checkpoint(engine, parameters, folder, step=step, counters={}, identity={})
    dist.barrier()
    if dist.get_rank() == 0:
        for step in damaged:
            file = folder / f"step_{step:08d}" / name
            data = bytearray(file.read_bytes())
            data[at] ^= 1
            file.write_bytes(data)
    dist.barrier()
    try:
        state, path, problems = load_newest(engine, parameters, find_checkpoint(folder))
        return state.step, path.name, problems
    finally:
        engine.destroy()


@pytest.mark.parametrize("name, at", [("rank_00001.safetensors", 12), ("rank_00000.safetensors", -5)])
def test_of_damaged_checkpoints_the_newest_whole_one_is_loaded_and_they_lose_their_names(ranks2, tmp_path, name, at):
    for step, path, problems in ranks2.run(save_damage_and_load_newest, tmp_path / "checkpoints", (2, 3), name, at):
        assert (step, path) == (1, "step_00000001") and len(problems) == 2
        assert f"step_00000003/{name}: the SHA-256" in problems[0] and f"step_00000002/{name}" in problems[1]
    found = names(tmp_path / "checkpoints")
    assert found == {"step_00000001", "damaged_step_00000002", "damaged_step_00000003", "latest"}
    assert find_checkpoint(tmp_path).name == "step_00000001"


def test_where_all_checkpoints_are_damaged_the_oldest_is_named_and_nothing_is_renamed(ranks2, tmp_path):
    with pytest.raises(UserError, match="step_00000001/rank_00001.safetensors: the SHA-256"):
        ranks2.run(save_damage_and_load_newest, tmp_path / "checkpoints", (1, 2, 3), "rank_00001.safetensors", 12)
    assert names(tmp_path / "checkpoints") == {"step_00000001", "step_00000002", "step_00000003", "latest"}
