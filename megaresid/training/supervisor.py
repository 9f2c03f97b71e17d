"""What a rank has to do with the processes above it: the supervisor (``launch/supervise.py``) and the launcher.

The supervisor gives the ranks of its machine a folder, by the environment. In it a rank says who it is, which step it
is at and how it ended, so that the supervisor knows whom to send signals, whom to name and which code to return. The
supervisor holds a lock there for as long as it lives.
"""

import ctypes
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megaresid.errors import UserError
from megaresid.exit_codes import FAULT, USERS_MISTAKE

FOLDER = "MEGARESID_SUPERVISOR"
LOCK = "alive"
_BYTES = 128  # of a report: rewritten in place, which a full disk does not hinder
_REWRITING = 1.0
"""Seconds. A reader may come in the middle of a rewriting, and reads again; a busy machine may hold that up."""
_PR_SET_PDEATHSIG = 1
_SYSTEM = ("systemd", "init")


def is_supervised() -> bool:
    """Not where the environment was handed on to another machine."""
    return FOLDER in os.environ and Path(os.environ[FOLDER]).is_dir()


class Report:
    """This rank's word to the supervisor; without one, nothing is written."""

    def __init__(self):
        rank = int(os.environ.get("RANK", "0"))
        self._state = {"rank": rank, "pid": os.getpid(), "step": None, "code": None}
        self._file = None
        if is_supervised():
            path = Path(os.environ[FOLDER], f"rank_{rank:05d}")
            aside = path.with_name(f".{path.name}")
            self._file = os.open(aside, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC)
            self._write()
            os.replace(aside, path)  # it is there with its first word in it

    def at(self, step: int) -> None:
        """The step that is being made, counted from 1."""
        self._state["step"] = step
        self._write()

    def ends(self, code: int) -> None:
        self._state["code"] = code
        self._write()

    @contextmanager
    def of_the_end(self) -> Iterator[None]:
        """Tell the code of an error that ends the block."""
        try:
            yield
        except BaseException as error:
            code = error.code if isinstance(error, SystemExit) else FAULT
            self.ends(USERS_MISTAKE if isinstance(error, UserError) else code if isinstance(code, int) else FAULT)
            raise

    def _write(self) -> None:
        if self._file is not None:
            os.pwrite(self._file, json.dumps(self._state).encode().ljust(_BYTES), 0)


def read_reports(folder: Path) -> list[dict]:
    """What the ranks have said, the one that spoke last last."""
    found = [(path.stat().st_mtime_ns, report) for path in folder.glob("rank_*") if (report := _read(path))]
    return [report for _, report in sorted(found, key=lambda pair: (pair[0], pair[1]["rank"]))]


def _read(path: Path) -> dict | None:
    """None where it stays half-written: the system has failed while the rank wrote."""
    deadline = time.monotonic() + _REWRITING
    while True:
        try:
            return json.loads(path.read_bytes())
        except ValueError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.001)


def die_with_launcher() -> None:
    """Have the system kill this rank when what started it is gone: the launcher, or the supervisor above that.

    A process that a person started by itself is left alone: it may outlive its shell.
    """
    if is_supervised():
        threading.Thread(target=_die_with_supervisor, name="supervisor", daemon=True).start()
    if "LOCAL_RANK" not in os.environ or sys.platform != "linux":
        return
    before = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != before or _is_the_systems(before):
        os.kill(os.getpid(), signal.SIGKILL)


def _is_the_systems(parent: int) -> bool:
    """Whether the parent is not the launcher but who takes up orphans: the launcher had died before we asked."""
    if not {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & os.environ.keys():
        return False
    try:
        return Path(f"/proc/{parent}/comm").read_text(encoding="utf-8").strip() in _SYSTEM
    except OSError:
        return True


def _die_with_supervisor() -> None:
    folder = Path(os.environ[FOLDER])
    try:
        with open(folder / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)  # until the supervisor is gone
    except OSError:  # its folder is gone already
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)
