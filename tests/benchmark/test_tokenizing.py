"""The ways of tokenizing: each makes the same ids, and a side that fails is told of."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from data_prep.tokenizer import gpt2_encoding
from megaresid.benchmark import tokenizing, tokenizing_ways
from megaresid.benchmark.tokenizing import Request, main, measure, on_cores, size_of, ways
from megaresid.benchmark.tokenizing_report import summarise
from megaresid.benchmark.tokenizing_ways import WAYS, Measurement, raw, raw_texts, texts
from megaresid.errors import UserError

DOCUMENTS = [f"Document {n}: it's the {n * n}th, naïve <|endoftext|> one.\n" * (1 + n % 7) for n in range(60)]
IDS = [[50256, *gpt2_encoding().encode_ordinary(document)] for document in DOCUMENTS]
TOKENS = sum(map(len, IDS))


@pytest.fixture
def files(tmp_path):
    """Two files, the first of three row groups."""
    names = [str(tmp_path / f"{n}.parquet") for n in range(2)]
    for name, some in zip(names, (DOCUMENTS[:40], DOCUMENTS[40:]), strict=True):
        parquet.write_table(pyarrow.table({"id": [""] * len(some), "text": some}), name, row_group_size=15)
    return names


def test_all_read_the_same_text(files):
    assert list(texts(files)) == DOCUMENTS
    assert [text.decode() for text in raw_texts(files)] == DOCUMENTS
    assert size_of(files) == (60, sum(len(document.encode()) for document in DOCUMENTS))


def result_of(*lines: str) -> str:
    """What a Python of its own prints: these ways fork, which a process with threads may not survive."""
    code = "\n".join(["from pathlib import Path", "from megaresid.benchmark import tokenizing_ways as ways", *lines])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    return done.stdout.split()[-1]


def test_llmc_writes_what_its_format_says(files, tmp_path):
    shard_tokens = "ways.LLMC_SHARD_TOKENS = 1000"
    written = result_of(shard_tokens, f"print(ways.write_llmc({files!r}, Path({str(tmp_path)!r}), 2))")
    assert int(written) == TOKENS
    stream = [id for ids in IDS for id in ids]
    shards = sorted(tmp_path.glob("*.bin"))
    assert len(shards) == -(-TOKENS // 1000) > 2
    for n, shard in enumerate(shards):
        ids = stream[1000 * n : 1000 * (n + 1)]
        header = struct.pack("<3i", 20240520, 1, len(ids)) + bytes(1024 - 12)
        assert shard.read_bytes() == header + struct.pack(f"<{len(ids)}H", *ids)


def test_nanogpt_writes_all_documents(files, tmp_path):
    pytest.importorskip("datasets")
    assert int(result_of(f"print(ways.write_nanogpt({files!r}, Path({str(tmp_path)!r}), 1))")) == TOKENS
    found = [np.fromfile(tmp_path / f"{split}.bin", np.uint16) for split in ("train", "test")]
    ends = [np.split(ids, np.flatnonzero(ids == 50256) + 1)[:-1] for ids in found]
    documents = sorted(tuple(ids.tolist()[:-1]) for some in ends for ids in some)
    assert documents == sorted(tuple(ids[1:]) for ids in IDS)


def test_every_way_makes_the_same_ids(files):
    chosen = [way for way in WAYS if way in ("raw tiktoken, arrays", "raw gigatoken", "megaresid, tiktoken", "llm.c")]
    workers = min(2, len(os.sched_getaffinity(0)))
    request = Request(input=tuple(files), workers=(workers,), rounds=1)
    found = measure(request, [way for way in chosen if way in ways()])
    assert {one.tokens for (several,) in zip(found.values()) for one in several} == {TOKENS}
    assert all(one.seconds > 0 for several in found.values() for one in several)


def test_a_different_number_of_ids_is_an_error(monkeypatch):
    tokens = iter([5, 5, 5, 6])
    monkeypatch.setitem(WAYS, "llm.c", lambda *_: Measurement(1.0, next(tokens)))
    with pytest.raises(UserError, match="different numbers of ids"):
        measure(Request(input=(), workers=(1,), rounds=4), ["llm.c"])


def test_a_process_that_fails_ends_the_others(files, tmp_path):
    with pytest.raises(UserError, match="a process of the benchmark ended with code 1"):
        raw("lists", [*files, str(tmp_path / "missing")], tmp_path, 1)
    with pytest.raises(UserError, match="data_prep ended with code 2: error: "):
        tokenizing_ways.ours("tiktoken", [str(tmp_path / "missing")], tmp_path, 1)


def test_ways_take_turns_each_on_its_cores(monkeypatch):
    seen = []
    for way in ("llm.c", "nanoGPT"):

        def run(files, folder, workers, way=way):
            seen.append((way, workers, len(os.sched_getaffinity(0)), folder.is_dir()))
            return Measurement(1.0, 7)

        monkeypatch.setitem(WAYS, way, run)
    before = os.sched_getaffinity(0)
    measure(Request(input=(), workers=(1,), rounds=2), ["llm.c", "nanoGPT"])
    first, second = ("llm.c", 1, 1, True), ("nanoGPT", 1, 1, True)
    assert seen == [first, second, second, first]
    assert os.sched_getaffinity(0) == before
    with pytest.raises(KeyError), on_cores(1):
        raise KeyError
    assert os.sched_getaffinity(0) == before


def test_ratios_are_of_speeds_round_by_round():
    seconds = {
        ("raw tiktoken, lists", 1): [10.0, 20.0, 9.0],
        ("raw tiktoken, arrays", 1): [12.0, 16.0, 8.0],
        ("llm.c", 1): [20.0, 40.0, 30.0],
        ("megaresid, tiktoken", 1): [20.0, 16.0, 10.0],
    }
    found = {visit: [Measurement(one, 7) for one in several] for visit, several in seconds.items()}
    rows = {row["way"]: row for row in summarise(found, 40_000_000)}
    row = rows["megaresid, tiktoken"]
    assert row["megabytes_per_second"] == 2.5 and row["tokens"] == 7 and row["workers"] == 1
    # 10/20, 16/16, 8/10, and 20/20, 40/16, 30/10.
    ratios = [[row[name][key] for key in ("low", "median", "high")] for name in ("of_raw_tiktoken", "of_llmc")]
    assert ratios == [[0.5, 0.8, 1.0], [1.0, 2.5, 3.0]]
    assert rows["llm.c"]["of_llmc"]["median"] == 1.0


def test_what_was_measured_is_kept_and_drawn(files, tmp_path, monkeypatch, capsys):
    for way in WAYS:
        monkeypatch.setitem(WAYS, way, lambda *_: Measurement(2.0, 7))
    monkeypatch.setattr(tokenizing, "NEEDS", {"nanoGPT": ("no_such_package_here", "pip install it")})
    request = Request(tuple(files), (1,), rounds=2, json=tmp_path / "new" / "a.json", plot=tmp_path / "a.svg")
    main(request)
    kept = json.loads(request.json.read_text())
    size = sum(len(document.encode()) for document in DOCUMENTS)
    assert kept["schema"] == 1 and kept["text"] == {"documents": 60, "bytes": size}
    assert kept["options"] == {"input": ["0.parquet", "1.parquet"], "workers": [1], "rounds": 2}
    assert [row["way"] for row in kept["ways"]] == [way for way in WAYS if way != "nanoGPT"]
    assert all(row["seconds"] == [2.0, 2.0] for row in kept["ways"])
    assert request.plot.read_bytes().startswith(b"<?xml")
    assert "nanoGPT: left out, no_such_package_here is not installed: pip install it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rounds": 0}, "--rounds 0: must be at least 1"),
        ({"workers": (0,)}, "--workers 0: must be from 1 to"),
        ({"workers": (1, 9999)}, "--workers 9999: must be from 1 to"),
        ({"input": ("missing.parquet",)}, "--input missing.parquet: no such file"),
    ],
)
def test_mistakes_are_told(files, options, message):
    with pytest.raises(UserError, match=message):
        Request(**{"input": tuple(files), **options}).check()
