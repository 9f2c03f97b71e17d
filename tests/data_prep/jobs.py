"""Small jobs for tests: sources of several units, what must come of them by definition, and what came."""

import functools
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import tiktoken

from data_prep import backends, pipeline, plan, tokenizer, worker
from data_prep.job import Job
from data_prep.sources import grouping, jsonl

DOCUMENTS = [f"Document {n} says {'very ' * (n % 7)}little. {n * n}" for n in range(120)] + ["<|endoftext|>", "日本語"]
UNIT_BYTES = 1500


def small_units(monkeypatch) -> None:
    """Make units of about 20 documents, of a size that also decides how many processes there are; load the vocabulary
    of this process once for all jobs."""
    for module in (grouping, jsonl, plan, pipeline):
        monkeypatch.setattr(module, "UNIT_BYTES", UNIT_BYTES)
    monkeypatch.setattr(worker, "gpt2_ranks", ranks)
    monkeypatch.setattr(backends, "encoding_of", lambda of_ranks: gpt2())


def write_rows(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def job(rows: Path, out: Path, **options) -> Job:
    defaults = dict(source="jsonl", input=(str(rows),), shard_tokens=100, validation_fraction=0.2, workers=1)
    return Job(out=out, **defaults | {"tokenizer_backend": "tiktoken"} | options)


def read_shard(path: Path) -> list[int]:
    data = path.read_bytes()
    magic, version, tokens, *rest = struct.unpack("<256i", data[:1024])
    assert (magic, version, set(rest)) == (20240520, 1, {0})
    return list(struct.unpack(f"<{tokens}H", data[1024:]))


@functools.cache
def ranks(vocab_file: Path | None = None) -> tokenizer.Ranks:
    return tokenizer.gpt2_ranks(vocab_file)


@functools.cache
def gpt2() -> tiktoken.Encoding:
    return tokenizer.gpt2_encoding()


def expected_tokens(documents: list[str], fraction: float) -> dict[str, list[int]]:
    """By definition: each document after 50256, to val where its hash as a fraction of 1 is below the fraction."""
    encoding, result = gpt2(), {"train": [], "val": []}
    for text in documents:
        position = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64
        result["val" if position < fraction else "train"] += [50256, *encoding.encode_ordinary(text)]
    return result


def expected_shards(documents: list[str], fraction: float = 0.2, shard_tokens: int = 100) -> dict[str, bytes]:
    """The bytes of every shard by definition."""
    shards = {}
    for split, tokens in expected_tokens(documents, fraction).items():
        for number, start in enumerate(range(0, len(tokens), shard_tokens)):
            part = tokens[start : start + shard_tokens]
            header = struct.pack("<256i", 20240520, 1, len(part), *[0] * 253)
            shards[f"{split}_{number:06d}.bin"] = header + struct.pack(f"<{len(part)}H", *part)
    return shards


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


def data_set(folder: Path) -> tuple[dict[str, bytes], dict]:
    """The shards and the manifest's content; there must be nothing else in the folder."""
    shards = shard_bytes(folder)
    assert {path.name for path in folder.iterdir()} == {*shards, "manifest.json"}
    return shards, json.loads((folder / "manifest.json").read_text())["content"]


def records(out: Path) -> dict[str, tuple[int, int]]:
    """The completion records, with what changes when one is written again."""
    found = {path.name: path.stat() for path in (out / "parts").glob("0*.json")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def command_of(started, *options) -> subprocess.Popen:
    """The command that does a job, with small units, in a process group of its own."""
    code = (
        "import pytest, sys\n"
        "from jobs import small_units\n"
        "if __name__ == '__main__':\n"
        "    small_units(pytest.MonkeyPatch())\n"
        "    from data_prep.command import main\n"
        "    main(sys.argv[1:])\n"
    )
    script = started.out.parent / "command.py"
    script.write_text(code)
    folders = [str(Path(__file__).parent), str(Path(pipeline.__file__).parents[1])]
    given = ["--source", "jsonl", "--input", *started.input, "--out", started.out, "--workers", started.workers]
    given += ["--shard-tokens", started.shard_tokens, "--validation-fraction", started.validation_fraction, *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.Popen(
        [sys.executable, script, *map(str, given)],
        env=environment,
        start_new_session=True,
        # Where the tests themselves run in the background, Ctrl-C is ignored, and so it would be by what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
