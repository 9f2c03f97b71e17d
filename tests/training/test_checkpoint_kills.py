"""Processes that save and are killed, or find the disk full, at each access to the file system in turn.

The ranks are forked processes that save parts made here, and agree through pipes instead of a process group. Their
accesses go through a shim: functions of ``os``, and files that are opened for writing.
"""

import errno
import io
import itertools
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megaresid.training.agreement import CheckpointError, Ranks
from megaresid.training.checkpoint import find_checkpoint, read_parameters
from megaresid.training.checkpoint_format import fill, is_complete, layout_of
from megaresid.training.retention import Retention
from megaresid.training.saver import remove_outdated, write_checkpoint
from megaresid.training.snapshot import Described, Snapshot

FULL = pytest.mark.full
SAVED, FAILED, KILLED = 0, 3, 77
SIZE = 24
CHANGING = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")
TAKING_SPACE = {"mkdir", "write", "open for writing", "rename", "replace"}


class Piped(Ranks):
    """Ranks that tell each other by pipes."""

    def __init__(self, rank, pipes):
        self.rank, self.count, self._pipes = rank, len(pipes) + 1, pipes

    def gathered(self, mine):
        for pipe in self._pipes.values():
            pipe.send(mine)
        others = {rank: pipe.recv() for rank, pipe in self._pipes.items()}
        return [others.get(rank, mine) for rank in range(self.count)]


class Shim:
    """Counts the accesses of this process that change the file system, and asks ``fault(number, kind)`` before each."""

    def __init__(self, fault):
        self._fault, self._counted = fault, itertools.count(1)

    def access(self, kind):
        return self._fault(next(self._counted), kind)

    def install(self):
        for name in CHANGING:
            setattr(os, name, self._watched(name, getattr(os, name)))
        plain = io.open

        def watched_open(file, mode="r", *args, **options):
            if "w" not in mode:
                return plain(file, mode, *args, **options)
            self.access("open for writing")
            return _File(plain(file, mode, *args, **options), self)

        io.open = watched_open

    def _watched(self, name, function):
        def watched(*args, **options):
            if name != "open":  # for reading: a folder, to sync it or to remove what is in it
                self.access(name)
            return function(*args, **options)

        return watched


class _File:
    def __init__(self, file, shim):
        self._file, self._shim = file, shim

    def write(self, piece):
        half = memoryview(piece)[: len(piece) // 2]
        self._shim.access(lambda: (self._file.write(half), self._file.flush()))
        self._file.write(piece)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


def killed_at(number):
    def fault(count, kind):
        if count == number:
            if callable(kind):
                kind()  # half of a write gets to the disk
            os._exit(KILLED)

    return fault


def disk_full_from(number):
    def fault(count, kind):
        if count >= number:
            if callable(kind):
                kind()
                kind = "write"
            if kind in TAKING_SPACE:
                raise OSError(errno.ENOSPC, "No space left on device")

    return fault


def failing_at(number):
    def fault(count, kind):
        if count == number:
            raise OSError(errno.EIO, "Input/output error")

    return fault


def no_fault(count, kind):
    pass


def counting(file: Path):
    """Writes the number of accesses to a file."""

    def fault(count, kind):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, str(count).encode())
        os.close(descriptor)

    return fault


def values(step: int) -> torch.Tensor:
    return torch.arange(SIZE, dtype=torch.float32) + 100 * step


def part_of(step: int, rank: int, ranks: int) -> Snapshot:
    begin, end = SIZE * rank // ranks, SIZE * (rank + 1) // ranks
    tensors = {("parameter", "a"): values(step)[begin:end], ("exp_avg", "a"): torch.ones(end - begin)}
    layout = layout_of(tensors, {"a": (begin, end - begin)})
    elements = torch.empty(layout.size, dtype=torch.uint8)
    fill(elements, layout, tensors)
    return Snapshot(step, layout, elements, Described({"a": [SIZE]}, {}, {}), {}, {"tokens": step}, {})


def save(folder: Path, step: int, ranks: int, faults: dict | None = None, retention=Retention(2)) -> list[int]:
    """How each rank's process ended: it saves ``step`` under the fault in ``faults`` of its rank, if there is one."""
    ends = {pair: multiprocessing.Pipe() for pair in itertools.combinations(range(ranks), 2)}
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _save_in_child(folder, step, rank, ranks, ends, (faults or {}).get(rank, no_fault), retention)
        children.append(child)
    for pipe in itertools.chain(*ends.values()):
        pipe.close()
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _save_in_child(folder, step, rank, ranks, ends, fault, retention):
    code = 99
    try:
        pipes = {}
        for (one, other), (first, second) in ends.items():
            for end, mine, theirs in ((first, one, other), (second, other, one)):
                if mine == rank:
                    pipes[theirs] = end
                else:
                    end.close()
        piped, part = Piped(rank, pipes), part_of(step, rank, ranks)
        Shim(fault).install()
        try:
            write_checkpoint(piped, step, part, folder, retention)
            code = SAVED
            remove_outdated(piped, folder, retention)
        except (CheckpointError, EOFError, BrokenPipeError, ConnectionResetError):
            code = FAILED if code == 99 else code
        except BaseException as error:
            print(repr(error), file=sys.stderr)
    finally:
        os._exit(code)


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> dict[int, Path]:
    """By the number of ranks, a run with checkpoints of steps 1 and 2, a damaged one of step 3, and what a save that
    was killed has left."""
    runs = {}
    for ranks in (1, 2):
        run = tmp_path_factory.mktemp("before") / "run"
        folder = run / "checkpoints"
        for step in (1, 2, 3):
            assert save(folder, step, ranks, retention=Retention()) == [SAVED] * ranks
        (folder / "step_00000003" / "rank_00000.safetensors").write_bytes(b"half")
        (folder / "latest").write_text("step_00000002\n")
        (folder / ".tmp-step_00000009").mkdir()
        (folder / ".tmp-step_00000009" / "rank_00000.safetensors").write_bytes(b"half")
        (folder / ".tmp-latest").write_text("")
        runs[ranks] = run
    return runs


def run_like(before: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(before, place)
    return place


def names(run: Path) -> set[str]:
    return {entry.name for entry in (run / "checkpoints").iterdir()}


def accesses(before: Path, place: Path, ranks: int, rank: int) -> int:
    """Of a rank in a save without a fault."""
    run, file = run_like(before, place), place.with_name("accesses")
    assert save(run / "checkpoints", 3, ranks, {rank: counting(file)}) == [SAVED] * ranks
    assert names(run) == {"step_00000002", "step_00000003", "latest"}
    return int(file.read_text())


def assert_whole(run: Path) -> int:
    """The newest checkpoint is step 2 or 3 and holds that step's values; nothing incomplete but what was damaged before
    has a checkpoint's name; ``latest`` names a complete one."""
    newest = find_checkpoint(run)
    step = int(newest.name.removeprefix("step_"))
    assert step in (2, 3)
    assert torch.equal(read_parameters(newest)["a"], values(step))
    for other in newest.parent.glob("step_*"):
        assert is_complete(other) or (other.name, step) == ("step_00000003", 2)
    assert is_complete(newest.parent / (newest.parent / "latest").read_text().strip())
    return step


def assert_next_save_works(run: Path, newest: int, ranks: int) -> None:
    assert save(run / "checkpoints", newest + 1, ranks) == [SAVED] * ranks
    assert names(run) == {f"step_0000000{newest}", f"step_0000000{newest + 1}", "latest"}
    assert torch.equal(read_parameters(find_checkpoint(run))["a"], values(newest + 1))


@pytest.mark.parametrize("ranks, rank", [(1, 0), pytest.param(2, 0, marks=FULL), (2, 1)])
def test_a_kill_at_any_access_leaves_a_complete_checkpoint_and_the_next_save_cleans_up(before, tmp_path, ranks, rank):
    count = accesses(before[ranks], tmp_path / "run", ranks, rank)
    assert count >= (3 if rank else 25), "the shim sees little"
    newest = []
    for number in range(1, count + 1):
        run = run_like(before[ranks], tmp_path / "run")
        ended = save(run / "checkpoints", 3, ranks, {rank: killed_at(number)})
        assert ended[rank] == KILLED and set(ended) <= {KILLED, FAILED, SAVED}
        newest.append(assert_whole(run))
        assert_next_save_works(run, newest[-1], ranks)
    assert newest == sorted(newest) and newest[0] == 2, "a later kill lost what an earlier one had left"
    assert newest[-1] == (2 if rank else 3)


@pytest.mark.parametrize(
    "fault, ranks, rank",
    [
        (disk_full_from, 1, 0),
        pytest.param(disk_full_from, 2, 1, marks=FULL),
        (failing_at, 2, 1),
        pytest.param(disk_full_from, 2, 0, marks=FULL),
        pytest.param(failing_at, 1, 0, marks=FULL),
        pytest.param(failing_at, 2, 0, marks=FULL),
    ],
)
def test_a_fault_at_any_access_is_told_on_all_ranks_and_leaves_no_debris(before, tmp_path, ranks, rank, fault):
    count = accesses(before[ranks], tmp_path / "run", ranks, rank)
    for number in range(1, count + 1):
        run = run_like(before[ranks], tmp_path / "run")
        ended = save(run / "checkpoints", 3, ranks, {rank: fault(number)})
        newest = assert_whole(run)
        assert len(set(ended)) == 1 and ended[0] in (SAVED, FAILED)
        assert (ended[0] == SAVED) <= (newest == 3)
        if fault is disk_full_from and newest == 2:
            assert ended[0] == FAILED and not (run / "checkpoints" / ".tmp-step_00000003").exists()
        assert_next_save_works(run, newest, ranks)
