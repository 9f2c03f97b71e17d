"""Whether two run directories hold the same run: every loss, what each rank was given, and the state at the end."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megaresid.training.checkpoint_format import SavedState, check_hashes, complete_files
from megaresid.training.run_dir import read_metrics
from megaresid.training.zero_state.live import PARAMETER

ON_A_GPU = 1e-3
"""How far losses and norms may be apart, relatively, where kernels add up in no fixed order."""

CAN_CHANGE_A_RESULT = ("python", "platform", "processor", "devices", "cuda", "ranks", "threads_per_rank", "versions")
"""Of environment.json."""

Numbers = Mapping[Any, Any]


@dataclass(frozen=True)
class Row:
    """A line of the table: what was compared, how much of it, what differs (None: nothing, bit for bit), and whether
    that is a fault."""

    what: str
    compared: str
    difference: str | None
    fault: bool


def compare_numbers(whole: Path, resumed: Path, tolerance: float = 0.0) -> list[Row]:
    """Losses and gradient norms of every step and the numbers of every evaluation, of two run directories; a relative
    difference up to ``tolerance`` is no fault."""
    runs = read_metrics(whole), read_metrics(resumed)
    rows = []
    for what, key in (("losses", "train_loss"), ("gradient norms", "gradient_norm")):
        of_runs = [{row["step"]: row[key] for row in run if key in row} for run in runs]
        rows.append(_numbers_row(what, f"{len(of_runs[0])} steps", *of_runs, tolerance))
    of_runs = [{(row["step"], name): row[name] for row in run for name in _measured(row)} for run in runs]
    rows.append(_numbers_row("evaluations", f"{len(of_runs[0])} numbers", *of_runs, tolerance))
    return rows


def compare_traces(whole: Path, parts: Iterable[Path]) -> list[Row]:
    """What every rank was given, of a folder of traces, against others that go on with each other."""
    found = []
    for folders in ([whole], list(parts)):
        names = sorted({file.name for folder in folders for file in folder.glob("rank_*.jsonl")})
        given = {}
        for name in names:
            lines = "".join((folder / name).read_text(encoding="utf-8") for folder in folders if (folder / name).exists()).splitlines()
            # By number too: what comes twice, or in another order, is not the same.
            given |= {(name[:10], number): json.loads(line) for number, line in enumerate(lines)}
        found.append(given)
    rows = []
    for what, keys in (("samples", ("step", "accumulation", "samples", "windows")), ("tokens", ("tokens",))):
        of_runs = [{place: [row[key] for key in keys] for place, row in given.items()} for given in found]
        ranks = len({name for name, _ in of_runs[0]})
        compared = f"{len(of_runs[0])} micro-batches of {ranks} {'rank' if ranks == 1 else 'ranks'}"
        places = sorted(of_runs[0].keys() | of_runs[1].keys())
        differing = [place for place in places if of_runs[0].get(place) != of_runs[1].get(place)]
        difference = None
        if differing:
            (name, number), rest = differing[0], len(differing) - 1
            step = found[0].get(differing[0], found[1].get(differing[0]))["step"]
            difference = f"{name}, micro-batch {number} (step {step + 1}), and {rest} more"
        rows.append(Row(what, compared, difference, difference is not None or not of_runs[0]))
    return rows


def compare_checkpoints(whole: Path, resumed: Path, exact: bool = True) -> list[Row]:
    """Parameters, optimizer state and each rank's generators, of two checkpoints; what parameters and their state
    differ in is no fault unless ``exact``. Raises UserError for a damaged one."""
    for path in (whole, resumed):
        files = complete_files(path)
        check_hashes(path, files, files)
    differing: dict[str, list[str]] = {"parameters": [], "optimizer state": []}
    counts, sums = dict.fromkeys(differing, 0), {name: hashlib.sha256() for name in differing}
    with SavedState(whole) as one, SavedState(resumed) as other:
        for name in sorted(one.header.parameters.keys() | other.header.parameters.keys()):
            for kind in sorted(_kinds(one, name) | _kinds(other, name)):
                what = "parameters" if kind == PARAMETER else "optimizer state"
                counts[what] += 1
                first, second = (_bytes(state, kind, name) for state in (one, other))
                sums[what].update(f"{kind}:{name}".encode() + (first or b""))
                if first != second:
                    differing[what].append(f"{kind}:{name}" if kind != PARAMETER else name)
            if one.scalars(name) != other.scalars(name):
                differing["optimizer state"].append(f"{min(one.scalars(name) | other.scalars(name))}:{name}")
        rows = []
        for what, names in differing.items():
            difference = f"{names[0]} and {len(names) - 1} more" if names else None
            compared = f"{counts[what]} tensors, {sums[what].hexdigest()[:12]}"
            rows.append(Row(what, compared, difference, exact and difference is not None))
        generators = one.header.generators, other.header.generators
    ranks = [f"rank {rank}" for rank, pair in enumerate(zip(*generators)) if pair[0] != pair[1]]
    if len(generators[0]) != len(generators[1]):
        ranks.append(f"{len(generators[0])} ranks and {len(generators[1])}")
    rows.append(Row("generators", f"{len(generators[0])} ranks", ", ".join(ranks) or None, bool(ranks)))
    return rows


def environments_differ(whole: dict[str, Any], resumed: dict[str, Any]) -> list[str]:
    """What two environment.json say of what can change a result, where they differ."""
    told = []
    for key in CAN_CHANGE_A_RESULT:
        one, other = whole.get(key), resumed.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            names = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
            told += [f"{name} {one.get(name)} and {other.get(name)}" for name in sorted(names)]
        elif one != other:
            told.append(f"{key} {one} and {other}")
    return told


def _measured(row: Numbers) -> list[str]:
    """The names of an evaluation's own numbers in a row of metrics.jsonl; none in a row of training."""
    if not any(name.startswith("seconds/") for name in row):
        return []
    return [name for name in row if name not in ("schema", "step", "failed") and not name.startswith("seconds/")]


def _numbers_row(what: str, compared: str, whole: Numbers, resumed: Numbers, tolerance: float) -> Row:
    places = sorted(whole.keys() | resumed.keys())
    differing = [place for place in places if whole.get(place, "none") != resumed.get(place, "none")]
    if not differing:
        return Row(what, compared, None, what == "losses" and not whole)
    place = differing[0]
    apart = [_apart(whole.get(place), resumed.get(place)) for place in differing]
    where = f"step {place}" if isinstance(place, int) else f"{place[1]} at step {place[0]}"
    difference = (
        f"first {where}: {whole.get(place)} and {resumed.get(place)}; {len(differing)} in all, the largest "
        f"difference {max(apart):.2g}"
    )
    return Row(what, compared, difference, not max(apart) <= tolerance)


def _apart(one: float | None, other: float | None) -> float:
    """The relative difference; infinite where only one has a number."""
    if one is None or other is None:
        return float("inf")
    return abs(one - other) / max(abs(one), abs(other))


def _kinds(state: SavedState, name: str) -> set[str]:
    return set(state.kinds(name)) if name in state.header.parameters else set()


def _bytes(state: SavedState, kind: str, name: str) -> bytes | None:
    """All elements, whatever files hold them; None where there are none."""
    if kind not in _kinds(state, name):
        return None
    elements = torch.empty(prod(state.header.parameters[name]), dtype=state.kinds(name)[kind])
    state.read(kind, name, 0, elements)
    return elements.view(torch.uint8).numpy().tobytes()
