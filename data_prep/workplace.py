"""The folder of an unfinished job: one process at a time, and nothing of another's is touched."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.parts import PartRecord, read_record
from data_prep.plan import PARTS, PLAN, Plan, check_same, load_plan, write_plan
from megaresid.data.manifest import MANIFEST_NAME
from megaresid.errors import UserError

LOCK = "lock"
RECORD = re.compile(r"\d{6,}-\d{6,}\.json")
SHARD = re.compile(r"(train|val)_\d{6,}\.bin")
# What a file system says that has no locks.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def check_folder(out: Path, resume: bool) -> None:
    """Raise UserError where a job may not be done in ``out``; writes nothing."""
    if (out / PARTS / LOCK).exists():
        # Some network file systems lock only what may be written.
        with open(out / PARTS / LOCK, "r+") as lock:
            _lock(lock, out)
    _check_contents(out, resume)


def unfinished_plan(out: Path) -> Plan | None:
    """The plan of the unfinished job in ``out``."""
    return load_plan(out / PARTS) if (out / PARTS / PLAN).exists() else None


@contextmanager
def held(out: Path, plan: Plan, resume: bool) -> Iterator[Path]:
    """Hold ``out`` for this process, with ``plan`` written there; yields the folder of the parts.

    Raises UserError as ``check_folder`` does, for a job that differs from the unfinished one, and where another process
    holds the folder. When the body fails before any part is complete, what was made here is removed.
    """
    check_folder(out, resume)
    parts = out / PARTS
    made = [folder for folder in (parts, out, *out.parents) if not folder.exists()]
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name a folder that can be made") from None
    with open(parts / LOCK, "w") as lock:
        _lock(lock, out)
        # Another job may have come to its end before the lock was free.
        _check_contents(out, resume)
        if before := unfinished_plan(out):
            check_same(before, plan, out)
        try:
            if before is None:
                write_plan(parts, plan)
            yield parts
        except BaseException:
            if parts.exists() and not _records(parts):
                remove_parts(parts)
                for folder in made[1:]:
                    folder.rmdir()
            raise


def found_records(out: Path, plan: Plan) -> dict[str, PartRecord]:
    """The records of the complete parts in ``out``, by the name of their units. What lacks a file that could not be
    read is no complete part: it is tried again."""
    parts = out / PARTS
    names = sorted(path.stem for path in _records(parts))
    found = {name: read_record(parts, name, plan.sha256) for name in names}
    return {name: record for name, record in found.items() if record and not record.dropped.get("unreadable")}


def remove_records(parts: Path) -> None:
    """Make all parts incomplete."""
    for path in _records(parts):
        path.unlink()


def remove_parts(parts: Path) -> None:
    """Remove the folder of the parts, the plan last: until then, it is known what the rest is."""
    for path in parts.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (PLAN, LOCK):
            path.unlink()
    for name in (PLAN, LOCK):
        (parts / name).unlink(missing_ok=True)
    parts.rmdir()


def remove_shards(out: Path) -> None:
    """Remove what an interrupted job wrote of its data set, which is made again from its parts."""
    for path in out.iterdir():
        if SHARD.fullmatch(path.name) or path.name == f"{MANIFEST_NAME}.partial":
            path.unlink()


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold a folder that is there for this process, without a file in it. UserError where another one does."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        _lock(descriptor, out)
        yield
    finally:
        os.close(descriptor)


def _check_contents(out: Path, resume: bool) -> None:
    try:
        there = {path.name for path in out.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        file = isinstance(error, NotADirectoryError)
        says = "is a file; name a folder" if file else f"{error.strerror}; name another"
        raise UserError(f"--out {out}: {says}") from None
    unfinished = (out / PARTS / PLAN).exists()
    begun = PARTS in there and _only_begun(out / PARTS)
    if MANIFEST_NAME in there:
        # An unfinished job beside it is one that was stopped while it removed its parts.
        if not (resume and (unfinished or begun)):
            raise UserError(f"--out {out}: already holds a data set; name another folder, or delete this one")
    elif unfinished:
        if not resume:
            raise UserError(f"--out {out}: holds an unfinished job; go on with it by --resume, or delete the folder")
    elif there - ({PARTS} if begun else set()):
        raise UserError(f"--out {out}: not empty; name a new folder, or delete this one")


def _records(parts: Path) -> list[Path]:
    return [path for path in parts.iterdir() if RECORD.fullmatch(path.name)] if parts.is_dir() else []


def _only_begun(parts: Path) -> bool:
    """Whether a job was killed here before it wrote its plan, or when it had removed it."""
    return parts.is_dir() and {path.name for path in parts.iterdir()} <= {LOCK, f"{PLAN}.partial"}


def _lock(lock, out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {out}: another process is at work on it; wait for it, or name another folder") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
