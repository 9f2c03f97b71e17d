"""``report/eval.json``: what was measured of a model, each number with all that it depends on."""

import fcntl
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaresid.durable import write_text
from megaresid.errors import UserError

SCHEMA = 1
NAME = "eval.json"
STDERR = "_stderr"

Measurement = dict[str, Any]
"""One name at one step: ``name``, ``step``, ``limit``, ``metrics`` and what they were measured on and with."""


def metrics_of(numbers: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """{name: {"value": number, "stderr": number}} of named numbers; stderr only where there is one. JSON has no word
    for a number that is not finite: it becomes null."""
    found = {}
    for name, value in numbers.items():
        if not (name.endswith(STDERR) and name.removesuffix(STDERR) in numbers):
            found[name] = {"value": _finite(value)}
            if (stderr := numbers.get(name + STDERR)) is not None:
                found[name]["stderr"] = _finite(stderr)
    return found


def read(folder: Path) -> list[Measurement]:
    """The measurements in a folder's ``eval.json``; none where there is no such file. Raises UserError where it cannot
    be added to."""
    path = folder / NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        found = tree["measurements"]
        if tree["schema"] != SCHEMA:
            raise UserError(
                f"{path}: its schema is {tree['schema']}, and this version writes {SCHEMA}: move the file away"
            )
        for measurement in found:
            _key(measurement)
        return found
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: move it away, and evaluate again what it held") from None


def add(folder: Path, measurement: Measurement) -> bool:
    """Add a measurement to the folder's ``eval.json``, written whole or not at all; whether it has replaced an earlier
    one: of the same name at the same step and limit."""
    with _alone(folder):
        before = read(folder)
        kept = [other for other in before if _key(other) != _key(measurement)]
        tree = {"schema": SCHEMA, "measurements": sorted([*kept, measurement], key=lambda m: (m["step"], m["name"]))}
        write_text(folder / NAME, json.dumps(tree, indent=2) + "\n")
    return len(kept) < len(before)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what is in them; the first two are words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    cells = ([side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _key(measurement: Measurement) -> tuple:
    return measurement["name"], measurement["step"], measurement["limit"]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of the processes that add to a folder's report at once, one after another; none loses what another added."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
