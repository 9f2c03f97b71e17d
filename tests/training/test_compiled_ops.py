"""Stale locks of compiled operators: removed when the builder is gone, never while one is at work."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaresid.training import compiled_ops
from megaresid.training.compiled_ops import PATIENCE, remove_stale_locks, use_environment_folder

HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def one_machine(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone as well
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", os.environ["PATH"])


@pytest.fixture
def lock(tmp_path):
    (tmp_path / "deepspeed_shm_comm").mkdir()
    return tmp_path / "deepspeed_shm_comm" / "lock"


@pytest.fixture
def builder(lock):
    """Another process that holds the lock as PyTorch's FileBaton does: created exclusively, kept open."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_lock_is_kept_while_its_builder_lives_and_removed_once_it_was_killed(tmp_path, lock, builder):
    assert remove_stale_locks(tmp_path) == [] and lock.exists()
    builder.kill()
    builder.wait()
    assert remove_stale_locks(tmp_path) == [lock] and not lock.exists()


def test_age_does_not_make_a_held_lock_stale(tmp_path, lock, builder):
    os.utime(lock, (0, 0))
    assert remove_stale_locks(tmp_path) == [] and lock.exists()


def test_it_is_the_lock_that_pytorch_waits_for(tmp_path, lock):
    """PyTorch cannot take what a killed builder left, and can after the removal; it may hold it meanwhile."""
    from torch.utils.file_baton import FileBaton

    lock.touch()
    baton = FileBaton(str(lock))
    assert not baton.try_acquire()
    assert remove_stale_locks(tmp_path) == [lock]
    assert baton.try_acquire()
    assert remove_stale_locks(tmp_path) == []
    baton.release()


TAKE = """
import sys, time
from pathlib import Path
from torch.utils.file_baton import FileBaton
from megaresid.training.compiled_ops import remove_stale_locks
lock = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
remove_stale_locks(lock.parents[1])
baton = FileBaton(str(lock))
if baton.try_acquire():
    time.sleep(1)
    (lock.parent / "built").touch()
    baton.release()
    print("built")
else:
    baton.wait()
    print("waited", (lock.parent / "built").exists())
"""


def test_ranks_that_start_together_build_once_after_a_stale_lock(tmp_path, lock):
    """Each clears the folder, then one builds while the other waits for it, and finds what was built."""
    lock.touch()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-c", TAKE, lock], **pipes) for _ in range(2)]
    assert [rank.stdout.readline() for rank in ranks] == ["ready\n"] * 2
    for rank in ranks:
        rank.stdin.write("\n")
        rank.stdin.flush()
    said = sorted(rank.communicate(timeout=30)[0] for rank in ranks)
    assert said == ["built\n", "waited True\n"] and not lock.exists()


def test_only_locks_are_removed(tmp_path, lock):
    lock.touch()
    others = [lock.with_name(name) for name in ("build.ninja", "deepspeed_shm_comm.so", "lock.txt")]
    for other in others:
        other.write_text("kept")
    remove_stale_locks(tmp_path)
    assert sorted(lock.parent.iterdir()) == sorted(others)


def test_a_folder_that_is_not_there_has_no_locks(tmp_path):
    assert remove_stale_locks(tmp_path / "absent") == []


LAUNCHERS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # where torchrun and DeepSpeed's launcher say how many ranks are here


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_with_all_ranks_on_one_machine_a_fresh_lock_without_owner_is_stale(tmp_path, lock, monkeypatch, launcher):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(launcher, "2")
    lock.touch()
    assert remove_stale_locks(tmp_path) == [lock] and not lock.exists()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("age, removed", [(0, False), (PATIENCE + 60, True)])
def test_on_several_machines_only_an_old_lock_is_stale(tmp_path, lock, monkeypatch, launcher, age, removed):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv(launcher, "2")
    lock.touch()
    os.utime(lock, (time.time() - age, time.time() - age))
    assert remove_stale_locks(tmp_path) == ([lock] if removed else [])


def test_an_orphaned_ninja_at_work_in_the_folder_keeps_the_lock(tmp_path, lock):
    """Its Python was killed and no longer holds the lock, but the compilation goes on."""
    lock.touch()
    ninja = tmp_path / "ninja"
    shutil.copy(shutil.which("sleep"), ninja)
    process = subprocess.Popen([ninja, "60"], cwd=lock.parent)
    try:
        while Path(f"/proc/{process.pid}/comm").read_text() != "ninja\n":
            time.sleep(0.01)
        assert remove_stale_locks(tmp_path) == []
    finally:
        process.kill()
        process.wait()
    assert remove_stale_locks(tmp_path) == [lock]


def test_the_folder_is_the_environments(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert use_environment_folder() == tmp_path / "torch_extensions"
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")


def test_the_environments_own_ninja_is_the_one_that_builds(monkeypatch, tmp_path):
    """What one version of ninja built, another builds anew; an environment that is not activated is not on PATH."""
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    use_environment_folder()
    use_environment_folder()
    assert shutil.which("ninja") == str(Path(sys.executable).parent / "ninja")
    assert os.environ["PATH"] == os.pathsep.join([str(Path(sys.executable).parent), str(tmp_path)])


def test_an_environment_at_a_path_with_spaces_links(monkeypatch, tmp_path):
    """What PyTorch gives the linker, -L and this constant, is one word to the shell."""
    import torch
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", cpp_extension.TORCH_LIB_PATH)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "check out/torch/__init__.py"))
    use_environment_folder()
    use_environment_folder()
    assert shlex.split(f"-L{cpp_extension.TORCH_LIB_PATH}") == [f"-L{tmp_path}/check out/torch/lib"]


def test_a_folder_that_is_set_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    assert use_environment_folder() == tmp_path / "mine"


def test_an_environment_that_cannot_be_written_to_leaves_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled_ops.os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert use_environment_folder().is_relative_to(tmp_path)
