import hashlib
import json
import struct

import pytest

from data_prep import manifest as checking
from data_prep.manifest import verify_shards
from megaresid.data.manifest import load_manifest


@pytest.fixture
def folder(tmp_path):
    """A data set that another project cut: names, split and shards are its own."""
    entries = []
    for name, split, ids in (
        ("web_val_000000.bin", "val", [5] * 700),
        ("web_train_000001.bin", "train", [7, 50256] * 900),
    ):
        data = struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}H", *ids)
        (tmp_path / name).write_bytes(data)
        entry = {"name": name, "split": split, "tokens": len(ids), "bytes": len(data), "largest_id": max(ids)}
        entries.append(entry | {"sha256": hashlib.sha256(data).hexdigest()})
    content = {
        "source": {"kind": "adopted", "revision": "1"},
        "options": {},
        "tokenizer": {"name": "gpt2", "sha256": "0" * 64, "vocab_size": 50257, "end_of_text": 50256},
        "split_rule": "as found",
        "splits": {"train": {"documents": 900, "tokens": 1800}, "val": {"documents": 0, "tokens": 700}},
        "dropped": {"empty": 0},
        "runs_cut": 0,
        "shards": entries,
    }
    tree = {"schema": 1, "content": content, "provenance": {"created": "2026", "versions": {}}}
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    return tmp_path


def problems(folder, report=lambda *told: None):
    return {entry.name: problem for entry, problem in verify_shards(folder, load_manifest(folder), report)}


def test_shards_as_they_were_written(folder, monkeypatch):
    monkeypatch.setattr(checking, "VERIFY_BYTES", 1024)
    reports = []
    found = problems(folder, lambda *told: reports.append(told))
    assert found == {"web_val_000000.bin": None, "web_train_000001.bin": None}
    total = 2 * 1024 + 2 * 2500
    # Two thousand and more bytes of the first file in pieces of 1024, then those of the second.
    read = [1024, 2048, 2424, 2424 + 1024, 2424 + 2048, 2424 + 3072, 2424 + 4096, total]
    tokens = [0, 512, 700, 700, 700 + 512, 700 + 1024, 700 + 1536, 2500]
    assert reports == [(place / total, 0, count) for place, count in zip(read, tokens, strict=True)]


@pytest.mark.parametrize("place", [1024, 2000, 2423])
def test_one_changed_byte(folder, place):
    path = folder / "web_val_000000.bin"
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    found = problems(folder)
    assert found.pop("web_train_000001.bin") is None
    assert (
        f"web_val_000000.bin: damaged, its sha256 is {hashlib.sha256(data).hexdigest()}" in found["web_val_000000.bin"]
    )


def test_missing_and_cut_short(folder):
    (folder / "web_val_000000.bin").unlink()
    path = folder / "web_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    found = problems(folder)
    assert "missing" in found["web_val_000000.bin"] and "cut short" in found["web_train_000001.bin"]


def test_a_disk_that_does_not_read(folder, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")
        yield

    monkeypatch.setattr(checking, "_read_into", broken)
    assert all("Input/output error" in problem for problem in problems(folder).values())
