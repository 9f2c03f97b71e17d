"""Sweeps of tiny models: their data, their command lines, and the command in this process."""

import json
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from megaresid import sweep

MODEL = "--model tiny --layers 2 --heads 2 --width 32 --context 16 --global-batch-size 4 --log-interval 1".split()
TOKENS = 4 * 16
"""Of a step."""


def make_place(folder: Path) -> Path:
    """A folder with data and a DeepSpeed JSON."""
    texts = (f"Line {n} of a text about the number {n * n}, and of others. " * 3 for n in range(40))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = ["--source", "jsonl", "--input", str(folder / "text.jsonl"), "--validation-fraction", "0.2"]
    data_prep([*options, "--out", str(folder / "data")])
    optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
    (folder / "ds.json").write_text(json.dumps({"optimizer": optimizer, "zero_optimization": {"stage": 0}}))
    return folder


def options(place: Path, out: str, **changes: str) -> list[str]:
    """A command line: two variants, one seed, three steps; ``changes`` are options of the sweep."""
    chosen = {"residual": "vanilla,learned_scale", "seeds": "1,", "budget": f"tokens={3 * TOKENS}"} | changes
    given = [text for name, value in chosen.items() for text in (f"--{name.replace('_', '-')}", value)]
    return [*given, "--out", str(place / out), *training(place)]


def training(place: Path) -> list[str]:
    data = ["--data", str(place / "data"), "--deepspeed_config", str(place / "ds.json")]
    return [*data, *MODEL, "--eval", "", "--checkpoint-interval", "0"]


def code_of(arguments: list[str]) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        sweep.main(arguments)
    return ended.value.code


def listed(out: Path) -> list[dict]:
    return json.loads((out / "sweep.json").read_bytes())["runs"]


def starts(out: Path, name: str) -> list[dict]:
    """Of a stub run, what each start had."""
    path = out / "runs" / name / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
