import hashlib
import os
import resource
import struct
import threading

import numpy as np
import pytest

from data_prep import writer
from data_prep.writer import ShardWriter


def shard(ids):
    return struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}H", *ids)


def as_written(entries):
    return [entry.model_dump() for entry in entries]


@pytest.mark.parametrize("pieces", [[1] * 25, [25], [10, 10, 5], [3, 0, 22], [9, 1, 1, 14]])
@pytest.mark.parametrize("shard_tokens", [1, 10, 25, 1000])
def test_shards_by_definition(tmp_path, pieces, shard_tokens):
    ids = [50256, *range(7, 30), 65535]
    shards = ShardWriter(tmp_path, "val", shard_tokens)
    start = 0
    for length in pieces:
        shards.append(np.array(ids[start : start + length], np.uint16))
        start += length
    expected = []
    for number in range(-(-len(ids) // shard_tokens)):
        part = ids[number * shard_tokens :][:shard_tokens]
        data = shard(part)
        name = f"val_{number:06d}.bin"
        checksum = hashlib.sha256(data).hexdigest()
        expected.append(
            dict(name=name, split="val", tokens=len(part), bytes=len(data), sha256=checksum, largest_id=max(part))
        )
    assert as_written(shards.finish()) == expected
    for number, entry in enumerate(expected):
        assert (tmp_path / entry["name"]).read_bytes() == shard(ids[number * shard_tokens :][:shard_tokens])
    assert len(list(tmp_path.iterdir())) == len(expected)


def test_ids_that_are_not_contiguous_or_big_endian(tmp_path):
    shards = ShardWriter(tmp_path, "train", 100)
    shards.append(np.arange(10, dtype=np.uint16)[::2])
    shards.append(np.array([300, 301], ">u2"))
    shards.finish()
    assert (tmp_path / "train_000000.bin").read_bytes() == shard([0, 2, 4, 6, 8, 300, 301])


def test_a_split_without_ids_has_no_shard(tmp_path):
    assert ShardWriter(tmp_path, "train", 3).finish() == []
    assert not list(tmp_path.iterdir())


def test_an_unfinished_shard_has_no_header(tmp_path):
    shards = ShardWriter(tmp_path, "train", 10**6)
    shards.append(np.full(10**5, 7, np.uint16))
    assert (tmp_path / "train_000000.bin").read_bytes()[:1100] == bytes(1024) + b"\7\0" * 38
    shards.discard()
    assert not list(tmp_path.iterdir())


def test_existing_files_are_not_overwritten(tmp_path):
    (tmp_path / "train_000001.bin").write_bytes(b"mine")
    shards = ShardWriter(tmp_path, "train", 2)
    with pytest.raises(FileExistsError, match="train_000001.bin"):
        shards.append(np.arange(5, dtype=np.uint16))
    shards.discard()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("train_000001.bin", b"mine")]


def test_a_full_shard_is_finished_while_the_next_one_fills(tmp_path, monkeypatch):
    """fsync is held up until more was appended: that would never end if append waited for it."""
    filled, synced = threading.Event(), []

    def fsync(file):
        assert filled.wait(30)
        synced.append(threading.current_thread() is not threading.main_thread())

    monkeypatch.setattr(writer.os, "fsync", fsync)
    shards = ShardWriter(tmp_path, "train", 4)
    shards.append(np.arange(6, dtype=np.uint16))
    assert (tmp_path / "train_000001.bin").exists() and not synced
    filled.set()
    assert [entry.tokens for entry in shards.finish()] == [4, 2]
    assert synced == [True, True]


def test_what_fails_in_the_background_comes_out(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    for last in (lambda shards: shards.finish(), lambda shards: shards.append(np.arange(9, dtype=np.uint16))):
        shards = ShardWriter(tmp_path, "train", 4)
        shards.append(np.arange(4, dtype=np.uint16))
        with pytest.raises(OSError, match="No space left on device"):
            last(shards)
        shards.discard()
        assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path):
    """The system refuses files beyond 64 KiB: as on a full disk, some of what is written still fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        shards = ShardWriter(tmp_path, "train", 10**6)
        with pytest.raises(OSError, match="File too large"):
            for _ in range(10):
                shards.append(np.arange(10_000, dtype=np.uint16))
            shards.finish()
        shards.discard()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_the_checksum_is_of_what_the_file_holds(tmp_path, monkeypatch):
    """A byte that changes between writing and reading back must show in the checksum."""

    def fsync(file):
        os.pwrite(file, b"\xff", 1024)

    monkeypatch.setattr(writer.os, "fsync", fsync)
    shards = ShardWriter(tmp_path, "train", 4)
    shards.append(np.arange(3, dtype=np.uint16))
    (entry,) = shards.finish()
    assert entry.sha256 == hashlib.sha256(shard([255, 1, 2])).hexdigest()
