"""The run directory: everything that a run is and did, each file naming its schema version."""

import fcntl
import json
import os
import platform
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from megaresid.durable import write_text
from megaresid.errors import UserError
from megaresid.json_text import parse_json
from megaresid.redaction import redacted

SCHEMA = 1
LOCK = ".lock"
HEARTBEATS = ".heartbeats"
"""Of the ranks, while they run."""
OUTCOME = "outcome.json"
"""How a run ended, and after which step; null from its (re)start until then."""
PACKAGES = (
    *("megaresid", "torch", "deepspeed", "triton", "flash-linear-attention", "fla-core"),
    *("numpy", "tiktoken", "tensorboard"),
)


def check_usable(path: Path, resuming: bool) -> None:
    """Raises UserError when ``path`` holds something that a new run would overwrite. Writes nothing."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--run-dir {path} is a file: name a folder")
    # These alone are what a start leaves that failed before anything was written.
    if path.exists() and any(file.name not in (LOCK, HEARTBEATS) for file in path.iterdir()):
        if not resuming:
            raise UserError(f"--run-dir {path} is in use: choose another, or go on with it by --resume auto")
        if not (path / "config.json").is_file():
            raise UserError(f"--run-dir {path} holds no run (no config.json): choose another folder")
    if path.exists():
        _check_links(path)


def _check_links(run: Path) -> None:
    """Nothing is written out of the run directory, whoever made what is in it."""
    inside = run.resolve()
    for folder, folders, files in os.walk(run):
        for entry in (Path(folder, name) for name in (*folders, *files)):
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(inside):
                raise UserError(f"--run-dir {run}: {entry.relative_to(run)} is a link out of it: put it there itself")


class RunDirectory:
    """The files of one run. Only rank 0 makes one; it holds a lock for as long as its process lives."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = open(path / LOCK, "wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--run-dir {path} is in use by another process: wait for it, or choose another") from None
        shutil.rmtree(path / HEARTBEATS, ignore_errors=True)

    def write(self, name: str, tree: dict[str, Any]) -> None:
        """Write ``name`` (a JSON file) whole or not at all, and without secrets."""
        write_json(self.path / name, {"schema": SCHEMA, **redacted(tree)})

    def keep_metrics_until(self, step: int) -> None:
        """Drop the rows of ``metrics.jsonl`` after ``step``: a resumed run writes those steps again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            # At step 0 nothing is resumed: the validation before the first step is measured again.
            rows = [row for row in read_metrics(self.path) if 0 < step >= row["step"]]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(path, text)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(tree, indent=2) + "\n")


def read_json(run: Path, name: str) -> dict[str, Any]:
    """A JSON file of a run directory; raises UserError when ``run`` is not one."""
    try:
        return parse_json((run / name).read_bytes())
    except OSError:
        raise UserError(f"{run} is not a run directory: it has no {name}") from None
    except ValueError as error:
        raise UserError(f"{run / name} is damaged: {error}") from None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; a last line cut short by a crash is left out. Raises UserError for one that is
    JSON and no row."""
    rows, path = [], run / "metrics.jsonl"
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = parse_json(line)
        except ValueError:
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise UserError(f"{path}, line {number}: no row of metrics, which has a step: take the line out")
        rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    """What the run ran on, as far as it can change a result: for ``environment.json``."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv[1:],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": devices,
        "cuda": torch.version.cuda,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "threads_per_rank": torch.get_num_threads(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
