"""Saving in the background: what is saved is the state of then, training goes on, and failed saves end nothing."""

import resource
import shutil
import signal
import threading
from collections import namedtuple
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from engines import equal, full_state, make_engine, train

from megaresid.errors import UserError
from megaresid.training import saver as saving
from megaresid.training.checkpoint import find_checkpoint, load_checkpoint, read_parameters
from megaresid.training.retention import Retention
from megaresid.training.saver import Saver

PATIENCE = 60.0


class Told:
    """In a recorder's place."""

    def __init__(self):
        self.lines, self.rows = [], []

    def say(self, line):
        self.lines.append(line)

    def record(self, step, row):
        self.rows.append((step, row))


def make_saver(engine, parameters, folder, newest=0, every=0, **options) -> tuple[Saver, Told]:
    told = Told()
    recorder = told if dist.get_rank() == 0 else None
    retention = Retention(newest, every)
    return Saver(engine, parameters, folder, identity={}, retention=retention, recorder=recorder, **options), told


@contextmanager
def held(rank: int):
    """The writing thread of this rank waits before it writes its elements, until the event that this gives is set."""
    go_on, reached, write = threading.Event(), threading.Event(), saving.write_elements

    def waiting(*args):
        reached.set()
        assert go_on.wait(PATIENCE)
        return write(*args)

    if dist.get_rank() == rank:
        saving.write_elements = waiting
    else:
        reached.set()
    try:
        yield reached, go_on
    finally:
        go_on.set()
        saving.write_elements = write


def save_while_training(stage, folder, slow_rank):
    """The state when it was saved, what the checkpoint makes of another engine, whether anything was there while it was
    being written, and the losses of training meanwhile and without a save."""
    engine, parameters = make_engine(stage)
    train(engine, range(2))
    state = full_state(engine, parameters)
    generator = torch.get_rng_state()
    saver, _ = make_saver(engine, parameters, folder)
    with held(slow_rank) as (reached, go_on), saver:
        saver.save(2, {"tokens": 7})
        assert reached.wait(PATIENCE)
        meanwhile = train(engine, range(2, 5))
        early = find_checkpoint(folder) if folder.exists() else None
        go_on.set()
    changed = full_state(engine, parameters)
    engine.destroy()
    path = find_checkpoint(folder)
    engine, parameters = make_engine(stage, seed=1)
    loaded = load_checkpoint(engine, parameters, path)
    same_generator = torch.equal(torch.get_rng_state(), generator)
    restored = full_state(engine, parameters)
    again = train(engine, range(2, 5))
    engine.destroy()
    assert loaded.counters == {"tokens": 7, "failed_saves": 0} and loaded.step == 2
    return early, equal(restored, state), not equal(changed, state), same_generator, again == meanwhile


@pytest.mark.parametrize("stage, slow_rank", [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_training_goes_on_while_the_state_of_then_is_written(ranks2, tmp_path, stage, slow_rank):
    """With collectives of the training between those of the save, on threads that run at their own pace."""
    for seen in ranks2.run(save_while_training, stage, tmp_path / "checkpoints", slow_rank):
        assert seen == (None, True, True, True, True)


def save_three_times(folder):
    engine, parameters = make_engine(1)
    train(engine, range(1))
    saver, told = make_saver(engine, parameters, folder)
    buffers = []
    with saver:
        for step in (1, 2, 3):
            with held(0) as (reached, go_on):
                saver.save(step, {})
                assert reached.wait(PATIENCE)
                buffers.append(saver._part.elements.data_ptr())
                train(engine, range(step, step + 1))
                with mock.patch.object(saver, "finish", lambda: (go_on.set(), Saver.finish(saver))):
                    saver.save(10 + step, {})
                saver.finish()
            saver.tell(step)
    engine.destroy()
    return told.lines, len(set(buffers)), sorted(path.name for path in folder.glob("step_*"))


def test_a_save_waits_for_the_one_before_says_so_once_and_uses_its_memory_again(ranks2, tmp_path):
    (lines, buffers, names), _ = ranks2.run(save_three_times, tmp_path)
    assert len(lines) == 1 and "training waits at step 11" in lines[0]
    assert buffers == 1
    assert names == [f"step_{step:08d}" for step in (1, 2, 3, 11, 12, 13)]


@contextmanager
def files_at_most(size: int, rank: int):
    """No file of this rank's process can be larger, as where a disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def save_onto_a_full_disk(folder, rank):
    """Saves step 2 while the disk takes nothing, then step 3; what is told after each, and what is there."""
    engine, parameters = make_engine(2)
    train(engine, range(1))
    saver, told = make_saver(engine, parameters, folder)
    seen = []
    with saver:
        saver.save(1, {})
        saver.finish()
        with files_at_most(500, rank):
            saver.save(2, {})
            saver.finish()
        train(engine, range(1, 2))
        saver.tell(5)
        seen.append((list(told.lines), list(told.rows), sorted(path.name for path in folder.iterdir())))
        saver.save(3, {})
        assert saver.saved()
        saver.tell(6)
    seen.append((told.lines, told.rows, sorted(path.name for path in folder.iterdir())))
    path = find_checkpoint(folder)
    failed = load_checkpoint(engine, parameters, path).counters["failed_saves"]
    engine.destroy()
    return seen, failed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_onto_a_full_disk_is_told_and_recorded_and_the_next_one_is_made(ranks2, tmp_path, rank):
    folder = tmp_path / "checkpoints"
    (full, after), failed = ranks2.run(save_onto_a_full_disk, folder, rank)[0]
    lines, rows, names = full
    assert len(lines) == 1 and "checkpoint 2 was not saved" in lines[0] and f"rank {rank}: OSError" in lines[0]
    assert "bytes needed" in lines[0] and f"free in {folder}" in lines[0]
    assert rows == [(5, {"failed_saves": 1})] and names == ["latest", "step_00000001"]
    assert after == (lines, rows, ["latest", "step_00000001", "step_00000003"])
    assert failed == 1


Usage = namedtuple("Usage", "total used free")


class Disk:
    """Says that ``free`` bytes are free, and as many more as checkpoints have been removed times ``size``."""

    def __init__(self, folder, free, size):
        self._folder, self._free, self._size = folder, free, size
        self._before = self._count()

    def _count(self):
        return len(list(self._folder.glob("step_*")))

    def __call__(self, path):
        return Usage(0, 0, self._free + self._size * (self._before - self._count()))


def save_with_free_space(folder, newest, every, steps, removed_needed):
    """Saves ``steps`` and then one more, for which room is when so many checkpoints are gone; whether it is saved."""
    engine, parameters = make_engine(1)
    train(engine, range(1))
    saver, told = make_saver(engine, parameters, folder, newest, every)
    with saver:
        for step in steps:
            saver.save(step, {})
            saver.finish()
        part = saver._part
        needed = [len(part.layout.header) + part.layout.size]
        dist.all_reduce(total := torch.tensor(needed))
        size = int(total)
        dist.barrier()
        with mock.patch.object(shutil, "disk_usage", Disk(folder, size - size * removed_needed, size)):
            dist.barrier()
            saver.save(50, {})
            saver.finish()
        saver.tell(50)
        ok, lines = saver._saved, list(told.lines)
    engine.destroy()
    return ok, lines, sorted(int(path.name[5:]) for path in folder.glob("step_*")), size


def test_without_space_what_need_not_be_kept_makes_room(ranks2, tmp_path):
    ok, lines, steps, _ = ranks2.run(save_with_free_space, tmp_path / "a", 3, 0, (1, 2, 3), 1)[0]
    assert ok and steps == [2, 3, 50] and not lines
    ok, _, steps, _ = ranks2.run(save_with_free_space, tmp_path / "b", 3, 2, (2, 3, 4, 5), 1)[0]
    assert ok and steps == [2, 4, 5, 50]


def test_without_space_the_last_good_checkpoint_and_those_kept_for_good_stay(ranks2, tmp_path):
    ok, lines, steps, size = ranks2.run(save_with_free_space, tmp_path / "a", 1, 0, (1, 2), 2)[0]
    assert not ok and steps == [2]
    assert f"{size:,} bytes needed, {-size:,} free" in lines[0]
    ok, lines, steps, _ = ranks2.run(save_with_free_space, tmp_path / "b", 2, 5, (5, 10, 11, 12), 3)[0]
    assert not ok and steps == [5, 10, 12]


def end_onto_a_full_disk(folder, mended):
    engine, parameters = make_engine(1)
    train(engine, range(3))
    state = full_state(engine, parameters)
    saver, told = make_saver(engine, parameters, folder)
    write, calls = saving.write_elements, []

    def full(*args):
        calls.append(1)
        if len(calls) == 2 and mended:
            return write(*args)
        raise OSError(28, "No space left on device")

    saving.write_elements = full
    try:
        with saver:
            saver.save(3, {})
            saver.finish()
            train(engine, range(3, 4))  # what is tried again is the copy
            ok = saver.saved()
    finally:
        saving.write_elements = write
    engine.destroy()
    same = equal(read_parameters(find_checkpoint(folder)), state["parameter"]) if ok else None
    return ok, same, len(calls), told.lines


@pytest.mark.parametrize("mended", [True, False])
def test_a_last_save_that_fails_is_tried_once_more(ranks2, tmp_path, mended):
    told = []
    for ok, same, calls, lines in ranks2.run(end_onto_a_full_disk, tmp_path / "checkpoints", mended):
        assert (ok, same, calls) == ((True, True, 2) if mended else (False, None, 2))
        told += lines
    if not mended:
        assert any("the weights of step 3 are not saved" in line for line in told)


def save_what_cannot_be(folder):
    engine, parameters = make_engine(1)
    saver, told = make_saver(engine, parameters, folder)
    if dist.get_rank() == 1:
        saver._identity = {"a": object()}
    with saver:
        saver.save(1, {})
        ok = saver.saved()
    engine.destroy()
    return ok, told.lines


def test_a_rank_without_a_copy_fails_the_save_on_all_ranks_alike(ranks2, tmp_path):
    first, second = ranks2.run(save_what_cannot_be, tmp_path / "checkpoints")
    assert not first[0] and not second[0]
    assert "rank 1: TypeError" in first[1][0]
    assert not (tmp_path / "checkpoints").exists()


def save_an_unknown_engine(folder):
    engine, parameters = make_engine(0)
    engine.optimizer = object()
    Saver(engine, parameters, folder, identity={}, retention=Retention())


def test_an_engine_that_cannot_be_saved_is_refused_before_training(ranks1, tmp_path):
    with pytest.raises(UserError, match="checkpoints do not know the state of"):
        ranks1.run(save_an_unknown_engine, tmp_path)


def retained(folder, newest, every, steps):
    engine, parameters = make_engine(0)
    saver, _ = make_saver(engine, parameters, folder, newest, every)
    with saver:
        for step in steps:
            saver.save(step, {})
    engine.destroy()
    return sorted(int(path.name[5:]) for path in folder.glob("step_*"))


@pytest.mark.parametrize(
    "newest, every, kept",
    [(0, 0, [5, 10, 15, 20, 25, 28]), (2, 0, [25, 28]), (1, 10, [10, 20, 28]), (3, 10, [10, 20, 25, 28])],
)
def test_the_newest_are_kept_and_every_so_many_steps_for_good(ranks1, tmp_path, newest, every, kept):
    assert ranks1.run(retained, tmp_path, newest, every, (5, 10, 15, 20, 25, 28)) == [kept]
