import pickle
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megaresid.data import shards
from megaresid.data.manifest import load_manifest
from megaresid.data.shards import TokenStream, check_shard, pack_header, parse_header
from megaresid.errors import UserError

TRAIN = [[5, 700, 2, 50256], [1], [65535, 3, 4], list(range(100, 140))]


@pytest.fixture
def folder(tmp_path, write_data_set):
    names = {f"train_{n:06d}.bin": ids for n, ids in enumerate(TRAIN)}
    return write_data_set(tmp_path / "set", names | {"val_000000.bin": [9, 8]})


@pytest.fixture
def stream(folder):
    return TokenStream.open(folder, load_manifest(folder), "train")


def test_header_is_llm_c_version_1():
    assert pack_header(123456789) == struct.pack("<256i", 20240520, 1, 123456789, *[0] * 253)
    assert parse_header(pack_header(2**31 - 1), "x") == 2**31 - 1


def test_every_range_of_the_stream(stream):
    tokens = sum(TRAIN, [])
    assert len(stream) == len(tokens)
    for start in range(len(tokens) + 1):
        for end in range(start, len(tokens) + 1):
            found = stream.read(start, end - start)
            assert found.dtype == np.uint16 and found.tolist() == tokens[start:end]


def test_ranges_outside_the_stream(stream):
    for start, length in ((-1, 2), (0, 49), (48, 1), (60, 0)):
        with pytest.raises(IndexError):
            stream.read(start, length)


def test_locate(folder, stream):
    places = [(folder / f"train_{n:06d}.bin", offset) for n, ids in enumerate(TRAIN) for offset in range(len(ids))]
    assert [stream.locate(position) for position in range(len(stream))] == places
    for position in (-1, len(stream)):
        with pytest.raises(IndexError):
            stream.locate(position)


def test_windows_overlap_by_the_target(stream):
    tokens = sum(TRAIN, [])
    found = stream.read_windows(np.array([4, 0, 4]), 5)
    assert found.tolist() == [tokens[20:26], tokens[0:6], tokens[20:26]]


def test_splits_are_apart_and_one_may_lack(folder, tmp_path, write_data_set):
    assert TokenStream.open(folder, load_manifest(folder), "val").read(0, 2).tolist() == [9, 8]
    alone = write_data_set(tmp_path / "alone", {"train_000000.bin": [1, 2]})
    with pytest.raises(UserError, match="no val shards"):
        TokenStream.open(alone, load_manifest(alone), "val")


def test_few_open_files_many_threads_and_copies(stream, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 1)
    tokens = sum(TRAIN, [])
    starts = np.random.default_rng(0).integers(0, len(tokens) - 7, 2000).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: stream.read(start, 7).tolist(), starts))
    assert found == [tokens[start : start + 7] for start in starts]
    assert len(stream._files) == 1
    assert pickle.loads(pickle.dumps(stream)).read(0, len(tokens)).tolist() == tokens
    stream.close()
    assert stream.read(3, 3).tolist() == tokens[3:6]


def resident_kib() -> int:
    return int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.parametrize("reads", [4000, pytest.param(200_000, marks=pytest.mark.full)])
def test_memory_does_not_grow_with_what_was_read(tmp_path, write_data_set, reads):
    """Windows from all over 10 GB of sparse shards: each touches a page or two of its own."""
    folder = write_data_set(tmp_path / "set", {"train_000000.bin": [1, 2]})
    size, entry = 10**8, load_manifest(folder).shards("train")[0]
    entries = []
    for number in range(50):
        with open(folder / f"train_{number:06d}.bin", "wb") as file:
            file.write(pack_header(size))
            file.truncate(1024 + 2 * size)
        changes = {"name": f"train_{number:06d}.bin", "tokens": size, "bytes": 1024 + 2 * size}
        entries.append(entry.model_copy(update=changes))
        check_shard(folder / entries[-1].name, entries[-1])
    stream = TokenStream(folder, entries)
    assert 2 * len(stream) == 10**10
    windows = np.random.default_rng(0).integers(0, len(stream) // 1024 - 1, reads)
    stream.read_windows(windows[:100], 1024)
    before = resident_kib()
    for first in range(0, reads, 100):
        assert not stream.read_windows(windows[first : first + 100], 1024).any()
    assert resident_kib() - before < 4 * 1024


def damage(folder, change):
    path = folder / "train_000000.bin"
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))
    return path


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda data: data[:-2], "cut short, 1030 bytes where the manifest says 1032"),
        (lambda data: data + b"\0\0", "too long, 1034 bytes where the manifest says 1032"),
        (lambda data: data[:100], "cut short, 100 bytes"),
        (lambda data: b"", "cut short, 0 bytes"),
        (lambda data: struct.pack("<i", 20240801) + data[4:], "magic number is 20240801 where a shard has 20240520"),
        (lambda data: data[:4] + struct.pack("<i", 7) + data[8:], "shard version 7"),
        (lambda data: data[:8] + struct.pack("<i", 5) + data[12:], "counts 5 tokens, the manifest 4"),
    ],
)
def test_damaged_shards(folder, change, says):
    path = damage(folder, change)
    manifest = load_manifest(folder)
    with pytest.raises(UserError) as caught:
        check_shard(path, manifest.shards("train")[0])
    assert str(path) in str(caught.value) and says in str(caught.value)
    with pytest.raises(UserError, match=re.escape(says)):
        TokenStream.open(folder, manifest, "train")
    TokenStream.open(folder, manifest, "val")


def test_missing_shard_and_one_cut_while_in_use(folder, stream):
    damage(folder, lambda data: data[:-2])
    with pytest.raises(UserError, match="train_000000.bin: cut short while in use at byte 1030"):
        stream.read(0, 6)
    (folder / "train_000001.bin").unlink()
    with pytest.raises(UserError, match="train_000001.bin: missing"):
        check_shard(folder / "train_000001.bin", stream.shards[1])
