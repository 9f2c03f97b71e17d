"""DeepSpeed's compiled operators: where they are kept, built ahead of training, and freed of stale locks.

PyTorch builds an extension under a file named ``lock`` in the extension's folder, which it creates, keeps open while
it builds and loads, and deletes. A process that is killed meanwhile leaves the file behind, and every later start
waits for it for ever, silently.
"""

import fcntl
import importlib.metadata
import os
import shlex
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from megaresid.training.machine import ranks_on_this_machine

PATIENCE = 600.0
"""Seconds after which a lock whose owner could be out of our sight is stale: the slowest build takes about 100."""


def use_environment_folder() -> Path:
    """Set ``TORCH_EXTENSIONS_DIR``, unless it is set, to a folder of this Python environment, and return it.

    Where the environment cannot be written to (one of the site's), it is a folder in the user's cache, one for each
    version of Python and torch. The environment's own programs go first on ``PATH``, since another version of
    ``ninja`` would build everything again, and none at all is an error. Call before DeepSpeed is imported.
    """
    scripts, path = sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != scripts:
        os.environ["PATH"] = scripts + os.pathsep + path
    folder = environment_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    _quote_library_folder()
    return folder


def environment_folder() -> Path:
    """The folder that ``use_environment_folder`` chooses; nothing is set."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder = Path(sys.prefix, "torch_extensions")
    if os.access(folder if folder.exists() else folder.parent, os.W_OK):
        return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = f"py{sys.version_info.major}{sys.version_info.minor}-torch{importlib.metadata.version('torch')}"
    return cache / "megaresid" / "torch_extensions" / versions


def _quote_library_folder() -> None:
    """PyTorch hands its library folder to the linker unquoted: with a space in its path nothing would link."""
    import torch
    from torch.utils import cpp_extension

    cpp_extension.TORCH_LIB_PATH = shlex.quote(str(Path(torch.__file__).parent / "lib"))


def remove_stale_locks(folder: Path) -> list[Path]:
    """Delete the locks under ``folder`` whose builder is gone; returns them.

    Call on every rank before DeepSpeed's operators are loaded: a rank that came first and found a stale lock would
    take its removal by another for the end of a build.

    A lock is left alone while a process has it open, or while a ``ninja`` whose parent died still compiles beside
    it. Where a live builder could be invisible (another user's lock, a job on several machines that share the
    folder, a system without /proc) it is stale only when it is also older than PATIENCE.
    """
    if not folder.is_dir():
        return []
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # One rank at a time: a lock judged here must not be removed by another rank, and made anew, before we do.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return [lock for lock in sorted(folder.glob("**/lock")) if _removed(lock)]
    finally:
        os.close(descriptor)


def stale_locks(folder: Path) -> list[Path]:
    """The locks that ``remove_stale_locks`` would delete."""
    return [lock for lock in sorted(folder.glob("**/lock")) if _is_stale(lock)]


def _removed(lock: Path) -> bool:
    if not _is_stale(lock):
        return False
    try:
        lock.unlink()
    except FileNotFoundError:  # released meanwhile
        return False
    return True


def _is_stale(lock: Path) -> bool:
    several_machines = int(os.environ.get("WORLD_SIZE") or 1) > ranks_on_this_machine()
    try:
        found = lock.stat()
    except FileNotFoundError:  # released meanwhile
        return False
    visible = found.st_uid == os.geteuid() and not several_machines and Path("/proc/self/fd").is_dir()
    return not (_has_builder(lock) or (not visible and time.time() - found.st_mtime < PATIENCE))


def _has_builder(lock: Path) -> bool:
    return any(
        _same_file(process / "cwd", lock.parent) and _name(process) == "ninja"
        or any(_same_file(descriptor, lock) for descriptor in _entries(process / "fd"))
        for process in _entries(Path("/proc"))
        if process.name.isdigit()
    )


def _same_file(link: Path, file: Path) -> bool:
    try:
        return os.path.samestat(link.stat(), file.stat())
    except OSError:  # the process has ended, or belongs to somebody else
        return False


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:
        return


def build() -> None:
    """Build what every run on a CPU loads, the collectives in shared memory; a GPU's runs load nothing compiled."""
    remove_stale_locks(use_environment_folder())
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and builder.is_compatible(verbose=True):
        builder.load(verbose=True)


if __name__ == "__main__":
    build()
