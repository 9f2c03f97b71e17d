import hashlib
import json
import os
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from other_projects import END_OF_TEXT, shard_bytes

from data_prep.__main__ import main
from data_prep.adopt import adopt
from data_prep.formats import ids
from data_prep.manifest import verify_shards
from megaresid.data.manifest import load_manifest
from megaresid.data.shards import TokenStream
from megaresid.errors import UserError

# Documents run on from shard to shard: the second begins within one.
SHARDS = {
    "fineweb_val_000000.bin": [END_OF_TEXT, 5, 6, END_OF_TEXT, 7],
    "fineweb_train_000002.bin": [9, 10, END_OF_TEXT, END_OF_TEXT, 40000],
    "fineweb_train_000010.bin": [11, 12, END_OF_TEXT],
    "fineweb_train_000001.bin": [8, END_OF_TEXT, 9, 9, 9, 9],
}
TRAIN = [8, END_OF_TEXT, 9, 9, 9, 9, 9, 10, END_OF_TEXT, END_OF_TEXT, 40000, 11, 12, END_OF_TEXT]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, tokens in SHARDS.items():
        (folder / name).write_bytes(shard_bytes(tokens))
    (folder / "README.md").write_text("what these are")
    return folder


def files(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("block", [2, 2**21])
def test_manifest_by_definition(folder, block, monkeypatch):
    monkeypatch.setattr(ids, "BLOCK_IDS", block)
    before = files(folder)
    manifest = adopt(folder)
    assert load_manifest(folder) == manifest
    after = files(folder)
    written = json.loads(after.pop("manifest.json")[0])
    assert after == before
    names = [f"fineweb_{name}.bin" for name in ("train_000001", "train_000002", "train_000010", "val_000000")]
    in_order = [token for name in names for token in SHARDS[name]]
    revision = hashlib.sha256(struct.pack(f"<{len(in_order)}H", *in_order)).hexdigest()
    assert written["content"] == {
        "source": {"kind": "adopted", "revision": f"sha256:{revision}"},
        "options": {},
        "tokenizer": {
            "name": "gpt2",
            "sha256": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
            "vocab_size": 50257,
            "end_of_text": 50256,
        },
        "split_rule": "as found: train or val in the names of the shards",
        "splits": {"train": {"documents": 4, "tokens": 14}, "val": {"documents": 2, "tokens": 5}},
        "dropped": {"empty": 0},
        "runs_cut": 0,
        "shards": [
            {
                "name": name,
                "split": name.split("_")[1],
                "tokens": len(SHARDS[name]),
                "bytes": 1024 + 2 * len(SHARDS[name]),
                "sha256": hashlib.sha256(before[name][0]).hexdigest(),
                "largest_id": max(SHARDS[name]),
            }
            for name in names
        ],
    }
    assert written["provenance"]["inputs"] == [str(folder)]
    assert [problem for _, problem in verify_shards(folder, manifest)] == [None] * 4


def test_streams_are_the_shards_of_a_split_by_name(folder):
    manifest = adopt(folder)
    for split, tokens in ("train", TRAIN), ("val", SHARDS["fineweb_val_000000.bin"]):
        stream = TokenStream.open(folder, manifest, split)
        assert stream.read(0, len(stream)).tolist() == tokens


def test_another_place_is_the_same_data_and_another_token_is_not(folder, tmp_path):
    first = adopt(folder).identity
    identities = []
    for change in 0, 1:
        other = tmp_path / f"other{change}"
        other.mkdir()
        for name, tokens in SHARDS.items():
            (other / name).write_bytes(shard_bytes([*tokens[:-1], tokens[-1] - change]))
        identities.append(adopt(other).identity)
    assert identities[0] == first != identities[1]


@pytest.mark.parametrize("name", ["tiny_shakespeare_val.bin", "edu_fineweb_val_000000.bin", "val.bin", "VAL-3.bin"])
def test_names_of_the_projects_that_write_shards(tmp_path, name):
    (tmp_path / name).write_bytes(shard_bytes([END_OF_TEXT, 1]))
    assert [(shard.name, shard.split) for shard in adopt(tmp_path).content.shards] == [(name, "val")]


def test_reports_how_far_it_is(folder, monkeypatch):
    monkeypatch.setattr(ids, "BLOCK_IDS", 2)
    reports = []
    adopt(folder, lambda *report: reports.append(report))
    assert reports == sorted(reports) and len(reports) == 3 + 3 + 2 + 3
    assert reports[0] == (2 / 19, 1, 2) and reports[-1] == (1.0, 6, 19)


GOOD = [END_OF_TEXT, 1, 2]
BAD_SHARDS = {
    "other magic": (shard_bytes(GOOD, magic=77), "not a shard, its magic number is 77"),
    "Llama 3": (shard_bytes(GOOD * 2, magic=20240801, version=7, tokens=3), "a shard of Llama 3's ids"),
    "llm.c's evaluations": (shard_bytes(GOOD, magic=20240522), "multiple-choice examples"),
    "nanoGPT's": (struct.pack("<2000H", *range(2000)), "not a shard"),
    "header unwritten": (bytes(1024) + b"\1\0\2\0", "unfinished shard"),
    "version": (shard_bytes(GOOD, version=2), "version 2"),
    "within the header": (shard_bytes(GOOD)[:1023], "cut short, 1023 bytes"),
    "empty file": (b"", "cut short, 0 bytes"),
    "unfinished": (shard_bytes(GOOD, tokens=4), "cut short, 1030 bytes where 4 tokens need 1032"),
    "odd": (shard_bytes(GOOD)[:-1], "cut short, 1029 bytes where 3 tokens need 1030"),
    "longer": (shard_bytes(GOOD, tokens=2), "too long, 1030 bytes where 2 tokens need 1028"),
    "no tokens": (shard_bytes([]), "counts 0 tokens"),
    "negative": (shard_bytes([], tokens=-1), "counts -1 tokens"),
    "id": (shard_bytes([END_OF_TEXT, 1, 2, 3, 50257]), "token 4 is id 50257, outside GPT-2's vocabulary of 50257"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_refuses_what_is_no_whole_shard_of_gpt2(folder, case, monkeypatch):
    monkeypatch.setattr(ids, "BLOCK_IDS", 3)
    content, says = BAD_SHARDS[case]
    (folder / "fineweb_train_000003.bin").write_bytes(content)
    before = files(folder)
    with pytest.raises(UserError, match="fineweb_train_000003.bin: ") as error:
        adopt(folder)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert files(folder) == before


@pytest.mark.parametrize("name", ["fineweb_000003.bin", "train_val.bin", "interval.bin", "trainer_values.bin"])
def test_refuses_a_name_that_tells_no_split(folder, name):
    (folder / name).write_bytes(shard_bytes(GOOD))
    with pytest.raises(UserError, match=f"{name}: its name has (both|neither) train (and|nor) val in it.*rename"):
        adopt(folder)


def test_refuses_a_name_that_no_manifest_holds(folder):
    (folder / "my train.bin").write_bytes(shard_bytes(GOOD))
    with pytest.raises(UserError, match="'my train.bin' is not a plain file name.*rename it"):
        adopt(folder)


def test_refuses_links_out_of_the_folder_and_what_is_no_file(folder, tmp_path):
    (tmp_path / "elsewhere.bin").write_bytes(shard_bytes(GOOD))
    link = folder / "fineweb_train_000003.bin"
    link.symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(UserError, match="fineweb_train_000003.bin: a link out of the folder"):
        adopt(folder)
    link.unlink()
    link.mkdir()
    with pytest.raises(UserError, match="fineweb_train_000003.bin: not a file"):
        adopt(folder)


def test_refuses_folders_that_hold_something_else(folder, tmp_path):
    with pytest.raises(UserError, match="missing: no such folder"):
        adopt(tmp_path / "missing")
    with pytest.raises(UserError, match="README.md: is a file; name its folder"):
        adopt(folder / "README.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no .bin shards in it"):
        adopt(tmp_path / "empty")
    (folder / "parts").mkdir()
    (folder / "parts" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="unfinished job of data_prep.*--resume"):
        adopt(folder)
    (folder / "parts" / "plan.json").unlink()
    adopt(folder)
    before = files(folder)
    with pytest.raises(UserError, match="has a manifest.json"):
        adopt(folder)
    assert files(folder) == before


@pytest.mark.full
def test_memory_does_not_grow_with_the_shards(tmp_path):
    tokens = np.arange(2**25, dtype="<u2") % 50000
    (tmp_path / "x_train_000000.bin").write_bytes(shard_bytes([], tokens=len(tokens)) + tokens.tobytes())
    tracemalloc.start()
    adopt(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < tokens.nbytes / 2
    tracemalloc.stop()


@pytest.mark.full
def test_a_training_run_on_adopted_shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, tokens in ("train_000001", 3000), ("train_000002", 2000), ("val_000000", 1500):
        ids = [END_OF_TEXT if n % 90 == 0 else n % 77 for n in range(tokens)]
        (folder / f"fineweb_{shard}.bin").write_bytes(shard_bytes(ids))
    main(["adopt", str(folder)])
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}))
    command = [sys.executable, "-m", "megaresid.train", "--deepspeed_config", str(tmp_path / "ds.json")]
    command += ["--data", str(folder), "--run-dir", str(tmp_path / "run"), "--steps", "4", "--eval", "validation@2"]
    command += "--model tiny --layers 2 --width 32 --context 32 --global-batch-size 4 --micro-batch-size 4".split()
    command += "--log-interval 1".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "TRAIN_METRICS: step=4, train_loss=" in done.stdout
