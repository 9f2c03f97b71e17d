"""Data folders, checkpoints, exported models and other projects' files, damaged or made up."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from made_runs import made_run
from safetensors.torch import save_file
from trying import byte_changes, changed_bytes, damaged, fuzz, texts

from data_prep import tokenizer
from data_prep.adopt import adopt
from data_prep.formats import megatron, nanogpt
from megaresid.data.manifest import check_vocabulary, load_manifest
from megaresid.data.shards import TokenStream, pack_header
from megaresid.errors import UserError
from megaresid.evaluation.data import FIELDS, read_rows
from megaresid.exchange.folder import open_folder
from megaresid.exchange.gpt2_folder import GPT2Folder
from megaresid.exchange.write import write_exported
from megaresid.saved_run import open_saved
from megaresid.summary import summarise
from megaresid.training.checkpoint import find_checkpoint


def shard(ids: list[int]) -> bytes:
    return pack_header(len(ids)) + struct.pack(f"<{len(ids)}H", *ids)


def once(folder: Path, make) -> Path:
    """A folder that ``make`` fills, beside the test's own, made by its first input."""
    made = folder / "made"
    if not made.exists():
        make(made)
    return made


SHARD = shard([50256, *range(90)])


def data_set(folder: Path) -> None:
    folder.mkdir()
    (folder / "train_000000.bin").write_bytes(SHARD)
    (folder / "val_000000.bin").write_bytes(shard([50256, 1, 2, 3]))
    adopt(folder)


MANIFEST = {
    "schema": 1,
    "content": {
        "source": {"kind": "text", "revision": "1", "dataset": "x"},
        "options": {"shard_tokens": 100, "validation_fraction": 0.5, "deduplicate": True},
        "tokenizer": {"name": "gpt2", "sha256": "0" * 64, "vocab_size": 50257, "end_of_text": 50256},
        "split_rule": "by hand",
        "splits": {"train": {"documents": 1, "tokens": 91}},
        "dropped": {"empty": 0},
        "runs_cut": 0,
        "shards": [
            {
                "name": "train_000000.bin",
                "split": "train",
                "tokens": 91,
                "bytes": len(SHARD),
                "sha256": hashlib.sha256(SHARD).hexdigest(),
                "largest_id": 50256,
            }
        ],
    },
    "provenance": {"created": "2026-01-01", "inputs": ["a"], "workers": 1, "versions": {"python": "3"}},
}


@fuzz(500, text=texts(MANIFEST, ["limited", "language", "val", "name", "x"]))
def test_manifests(folder, text):
    """What passes names files of the folder alone, whose tokens are all read."""
    made = once(folder, data_set)
    (made / "manifest.json").write_bytes(text)
    manifest = load_manifest(made)
    check_vocabulary(manifest, 50257)
    assert len(manifest.identity) == 64
    stream = TokenStream.open(made, manifest, "train")
    assert stream.read(0, len(stream)).nbytes == 2 * len(stream)
    stream.close()
    return "works"


@fuzz(600, data=damaged(SHARD))
def test_shards(folder, data):
    """Beside the manifest of the sound one."""
    made = once(folder, data_set)
    (made / "train_000000.bin").write_bytes(data)
    stream = TokenStream.open(made, load_manifest(made), "train")
    assert len(stream.read(0, len(stream))) == 91
    stream.close()
    return "works"


@fuzz(300, data=damaged(SHARD), name=st.sampled_from(["train_0.bin", "val.bin", "x_train_val.bin", "train \u00e9.bin"]))
def test_shards_that_are_adopted(folder, data, name):
    made = folder / "adopted"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    (made / name).write_bytes(data)
    assert adopt(made) == load_manifest(made)
    return "works"


def index(lengths: list[int], documents: list[int]) -> bytes:
    ends = np.cumsum(lengths) * 2
    tables = struct.pack(f"<{len(lengths)}i", *lengths) + (ends - 2 * np.array(lengths)).astype("<i8").tobytes()
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(documents))
    return header + tables + struct.pack(f"<{len(documents)}q", *documents)


INDEX, IDS = index([3, 1, 4], [0, 1, 3]), struct.pack("<8H", 1, 2, 50256, 50256, 5, 6, 7, 8)


@fuzz(400, idx=st.one_of(damaged(INDEX), damaged(INDEX), st.just(INDEX)), ids=st.one_of(st.just(IDS), damaged(IDS)))
def test_megatron_indices(folder, idx, ids):
    (folder / "train.idx").write_bytes(idx)
    (folder / "train.bin").write_bytes(ids)
    megatron.check(folder / "train.bin")
    blocks = list(megatron.read(folder / "train.bin", lambda count: None))
    assert sum(map(len, blocks)) >= len(ids) // 4
    return "works"


@fuzz(300, ids=st.one_of(damaged(IDS), st.binary(max_size=9)))
def test_raw_ids(folder, ids):
    path = folder / "train.bin"
    path.write_bytes(ids)
    assert nanogpt.check(path) == sum(block.nbytes for block in nanogpt.read(path, lambda count: None))
    return "works"


ROW = {"query": "a b", "choices": ["c", "d"], "gold": 1}


@fuzz(300, text=texts(ROW, [*ROW, "x"]))
def test_rows_of_tasks(folder, text):
    path = folder / "hellaswag_val_processed.jsonl"
    path.write_bytes(text)
    read_rows(path, FIELDS[path.name])
    return "works"


VOCABULARY = b"IQ== 0\nIg== 1\nIw== 2\n"


@fuzz(200, text=st.one_of(damaged(VOCABULARY), texts({"!": 0, "a": 1, "<|endoftext|>": 50256}, ["x", "\u0120"])))
def test_vocabularies(folder, text):
    """None of these is GPT-2's."""
    (folder / "encoder.json").write_bytes(text)
    (folder / "x.tiktoken").write_bytes(text)
    said = []
    for path in (folder, folder / "x.tiktoken"):
        with pytest.raises(UserError) as caught:
            tokenizer.gpt2_ranks(path)
        said.append(str(caught.value))
    return " and ".join("read" if "sha256" in words else "unreadable" for words in said)


def run_with_checkpoint(folder: Path) -> None:
    made_run(folder)
    ds_config = {"schema": 1, "zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": False}}
    (folder / "ds_config.json").write_text(json.dumps(ds_config))


def record(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def put(checkpoint: Path, name: str, data: bytes, agreeing: bool) -> None:
    """Replace a file; ``agreeing`` with a marker that says that this is what was written."""
    replace(checkpoint / name, data)
    if agreeing:
        marker = json.loads((checkpoint / "complete.json").read_text())
        marker["files"][name] = record(checkpoint / name)
        replace(checkpoint / "complete.json", json.dumps(marker).encode())


def linked(sound: Path, copy: Path) -> Path:
    """A copy whose files are the same until ``replace`` puts others in their place."""
    shutil.rmtree(copy, ignore_errors=True)
    return shutil.copytree(sound, copy, copy_function=os.link)


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def changed_file(path: Path, change, keys: list[str]) -> bytes:
    """Of a large file the changes alone are drawn: what is drawn is kept."""
    data = path.read_bytes()
    if path.suffix == ".json" or path.suffix == ".jsonl":
        return change.draw(texts(json.loads(data), keys))
    return changed_bytes(data, change.draw(byte_changes()))


NAMES = ["checkpoint.json", "complete.json", "rank_00000.safetensors", "rank_00001.safetensors"]


@fuzz(200, name=st.sampled_from(NAMES), change=st.data(), agreeing=st.sampled_from([True, True, False]))
def test_checkpoints(folder, name, change, agreeing):
    """A file of a checkpoint, with a marker that agrees with it: as somebody would make it who wants to be read."""
    sound = once(folder, run_with_checkpoint)
    run = linked(sound, folder / "run")
    checkpoint = run / "checkpoints/step_00000003"
    made = changed_file(checkpoint / name, change, ["x", "cpu", "../x", "rank_00002.safetensors"])
    put(checkpoint, name, made, agreeing and name != "complete.json")
    found = find_checkpoint(checkpoint)
    saved = open_saved(found)
    assert saved.step == 3 or name == "checkpoint.json"
    assert sum(parameter.numel() for _, parameter in saved.parameters())
    return "works"


FILES = ["config.json", "ds_config.json", "metrics.jsonl", "spec.json", "data.json"]


@fuzz(120, name=st.sampled_from(FILES), change=st.data())
def test_files_of_a_run(folder, name, change):
    """What a run is read back by: its model, and its summary."""
    sound = once(folder, run_with_checkpoint)
    run = linked(sound, folder / "run")
    row = {"schema": 1, "step": 2, "tokens": 9, "tokens_per_second": 3.5, "lambada_ppl": 3.0, "seconds/lambada": 2.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / "spec.json").write_text('{"schema": 1, "shape": {"context": 12, "vocab_size": 50257}}')
    (run / "data.json").write_text('{"schema": 1, "folders": []}')
    replace(run / name, changed_file(run / name, change, ["x", "val_loss", "failed", "step"]))
    open_saved(run)
    summarise(run)
    return "works"


def exported(folder: Path) -> None:
    made_run(folder.parent / "to export", ranks=1)
    write_exported(folder.parent / "to export", "safetensors", folder, None, say=lambda line: None)


@fuzz(120, name=st.sampled_from(["megaresid.json", "megaresid.json", "model.safetensors"]), change=st.data())
def test_exported_models(folder, name, change):
    sound = once(folder, exported)
    model = linked(sound, folder / "model")
    replace(model / name, changed_file(model / name, change, ["x", "../x", "heads"]))
    if name.endswith("safetensors"):
        description = json.loads((model / "megaresid.json").read_text())
        there = record(model / name)
        description["files"][name] = {"bytes": there["size"], "sha256": there["sha256"]}
        replace(model / "megaresid.json", json.dumps(description).encode())
    open_folder(model).model()
    return "works"


SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 4, "n_positions": 3, "vocab_size": 50257}
GPT2 = SIZES | {"model_type": "gpt2", "activation_function": "gelu_new", "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5}


def gpt2(folder: Path) -> None:
    folder.mkdir()
    width = 4
    tensors = {"wte.weight": torch.zeros(50257, width), "wpe.weight": torch.zeros(3, width)}
    block = {"ln_1.weight": [4], "ln_1.bias": [4], "attn.c_attn.weight": [4, 12], "attn.c_attn.bias": [12]}
    block |= {"attn.c_proj.weight": [4, 4], "attn.c_proj.bias": [4], "ln_2.weight": [4], "ln_2.bias": [4]}
    block |= {"mlp.c_fc.weight": [4, 16], "mlp.c_fc.bias": [16], "mlp.c_proj.weight": [16, 4], "mlp.c_proj.bias": [4]}
    tensors |= {f"h.0.{name}": torch.zeros(shape) for name, shape in block.items()}
    tensors |= {"ln_f.weight": torch.zeros(4), "ln_f.bias": torch.zeros(4), "lm_head.weight": torch.zeros(50257, width)}
    save_file(tensors, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(GPT2))
    weight_map = dict.fromkeys(tensors, "weights.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


PARTS = ["config.json", "config.json", "model.safetensors.index.json", "weights.safetensors"]


@fuzz(200, name=st.sampled_from(PARTS), change=st.data())
def test_folders_of_gpt2(folder, name, change):
    sound = once(folder, gpt2)
    model = linked(sound, folder / "model")
    replace(model / name, changed_file(model / name, change, ["x", "n_inner", "scale_attn_weights"]))
    dict(GPT2Folder(model, "test").parameters())
    return "works"
