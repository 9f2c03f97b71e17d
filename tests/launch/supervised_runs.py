"""Tiny runs under launch/train.sh in processes of their own, whose output is followed line by line."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from data_prep.__main__ import main as data_prep

ROOT = Path(__file__).parents[2]
MODEL = "--model tiny --layers 2 --width 32 --context 32 --dropout 0.1".split()
TRAINING = "--global-batch-size 8 --micro-batch-size 2 --log-interval 1 --checkpoint-interval 0".split()
PATIENCE = 240.0
"""Seconds for a line to come or a process to end; a start takes 15 to 20 of them."""


def make_workplace(folder: Path) -> Path:
    """A checkout whose environment is this Python's, with a space in its path, data and a DeepSpeed JSON."""
    root = folder / "check out"
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copy(ROOT / "setup.cfg", root)
    (root / ".venv/bin").mkdir(parents=True)
    sums = [
        subprocess.run("cksum", stdin=open(root / file), stdout=subprocess.PIPE, text=True).stdout
        for file in ("setup.cfg", "launch/constraints.txt")
    ]
    (root / ".venv/megaresid-complete").write_text(f"{''.join(sums)}{root}/.venv\nsystem torch: 0\nextras: dev,gpu\n")
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix, "torch_extensions"))
    (root / ".venv/torch_extensions").symlink_to(extensions)
    modules = {"python": "", "deepspeed": "-m deepspeed.launcher.runner", "torchrun": "-m torch.distributed.run"}
    for program, module in modules.items():
        path = root / ".venv/bin" / program
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        path.chmod(0o755)
    texts = (f"Line {n} of a text about the number {n * n}, and of others. " * 9 for n in range(80))
    (root / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = ["--source", "jsonl", "--input", str(root / "text.jsonl"), "--validation-fraction", "0.2"]
    data_prep([*options, "--out", str(root / "data")])
    optimizer = {"type": "AdamW", "params": {"torch_adam": True, "fused": True}}
    (root / "ds.json").write_text(json.dumps({"optimizer": optimizer, "zero_optimization": {"stage": 2}}))
    return root


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def launcher(name: str) -> list[str]:
    """The beginning of train.sh's arguments: two ranks, or one where nothing launches it."""
    return {
        "deepspeed": ["--num_accelerators", "2", "--master_port", free_port(), "--module", "megaresid.train"],
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", free_port(), "-m", "megaresid.train"],
        "python": ["python", "-m", "megaresid.train"],
    }[name]


def training(root: Path, run: str) -> list[str]:
    """The end of them: a run without an end in a folder of that name."""
    options = ["--deepspeed_config", str(root / "ds.json"), "--data", str(root / "data"), "--run-dir", str(root / run)]
    return [*options, *MODEL, *TRAINING, "--eval", "", "--steps", "1000000"]


class Started:
    """A command of its own session, its lines as they come. Use as a context manager: nothing of it is left behind."""

    def __init__(self, *command: str | Path, **environment: str):
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        self.pid = self._process.pid
        self._lines: list[str] = []
        self._ended, self._came = False, threading.Condition()
        self._seen = 0
        threading.Thread(target=self._follow, daemon=True).start()

    def until(self, pattern: str) -> re.Match:
        """Wait for the next line that the pattern is found in."""
        with self._came:
            while True:
                while self._seen < len(self._lines):
                    self._seen += 1
                    if match := re.search(pattern, self._lines[self._seen - 1]):
                        return match
                assert not self._ended, f"no {pattern!r} in\n{self.said()[-3000:]}"
                assert self._came.wait(PATIENCE), f"no {pattern!r} in {PATIENCE:g} s:\n{self.said()[-3000:]}"

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def code(self) -> int:
        """Wait for the end: of the process, and of all that holds its output."""
        with self._came:
            assert self._came.wait_for(lambda: self._ended, PATIENCE), f"still running:\n{self.said()[-3000:]}"
        return self._process.wait(PATIENCE)

    def said(self) -> str:
        return "".join(self._lines)

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_) -> None:
        for pid in family(self.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._process.wait()

    def _follow(self) -> None:
        for line in self._process.stdout:
            with self._came:
                self._lines.append(line)
                self._came.notify_all()
        with self._came:
            self._ended = True
            self._came.notify_all()


def _heed_interrupts() -> None:
    """A background process may have been told to ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def family(pid: int) -> list[int]:
    """A live process and those below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state not in "ZX":
            parents[int(stat.parent.name)] = int(parent)
    found = [pid] if pid in parents else []
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def left_of(pids: Iterable[int]) -> list[int]:
    """Those that live on, and what is below them. The system closes a killed process's output a moment before it counts
    it as dead, so that they are given a second."""
    pids, deadline = list(pids), time.monotonic() + 1
    while (left := [one for pid in pids for one in family(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def living(run: Path) -> list[int]:
    """The processes that were told to write to the run: launchers and ranks."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run).encode() in command.read_bytes().split(b"\0"):
                found.append(int(command.parent.name))
        except OSError:
            continue
    return found


def ranks_of(run: Path) -> dict[int, int]:
    """The process of each rank of a run."""
    found = {}
    for pid in living(run):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            _, _, module = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0-m\0")
        except OSError:
            continue
        if module.startswith(b"megaresid.train\0"):
            [rank] = [part[5:] for part in variables if part.startswith(b"RANK=")] or [b"0"]
            found[int(rank)] = pid
    return found
