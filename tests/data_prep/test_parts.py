import hashlib
import json
import struct
import zlib

import numpy as np
import pytest

from data_prep import parts
from data_prep.parts import DOCUMENT, PartWriter, read_blocks, read_record
from data_prep.sources.source import Unit
from megaresid.errors import UserError

PLAN = "ab" * 32
UNIT = Unit(group=3, index=12, position=1000, bytes=77, segments=())
NAME = "000003-000012"
COUNTS = {"text_bytes": 50, "runs_cut": 2, "dropped": {"empty": 3}, "backend": "gigatoken", "proven_bytes": 7}
# Ids of each document.
DOCUMENTS = [[50256, 1, 2, 3], [50256, 4], [50256, *range(5, 15)], [50256, 16], [50256, 17, 18]]


def rows_of(documents):
    rows = b"".join(hashlib.sha256(bytes(ids[1:])).digest() + struct.pack("<I", len(ids)) for ids in documents)
    return rows, np.frombuffer(rows, DOCUMENT)


def append(writer, documents):
    writer.append(np.array([id for ids in documents for id in ids], np.uint16), rows_of(documents)[1])


def write(folder, unit=UNIT, plan=PLAN):
    """Documents 0-1, then 2 in two steps, then 3-4."""
    writer = PartWriter(folder, unit, plan)
    append(writer, DOCUMENTS[:2])
    writer.append(np.array(DOCUMENTS[2][:4], np.uint16), rows_of([])[1])
    writer.append(np.array(DOCUMENTS[2][4:], np.uint16), rows_of(DOCUMENTS[2:3])[1])
    append(writer, DOCUMENTS[3:])
    return writer.finish(**COUNTS)


def test_files_are_what_the_format_says(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "BLOCK_TOKENS", 6)
    record = write(tmp_path)
    ids = [struct.pack(f"<{len(document)}H", *document) for document in DOCUMENTS]
    rows = [rows_of([document])[0] for document in DOCUMENTS]
    assert (tmp_path / f"{NAME}.ids").read_bytes() == b"".join(ids)
    assert (tmp_path / f"{NAME}.docs").read_bytes() == b"".join(rows)
    assert json.loads((tmp_path / f"{NAME}.json").read_text()) == {
        "name": NAME,
        "plan": PLAN,
        "position": 1000,
        "bytes": 77,
        "documents": 5,
        "tokens": 22,
        **COUNTS,
        # Blocks of 6 ids at least, and whole documents: 0-1, 2, 3-4 (5 ids, but there are no more).
        "blocks": [
            {"documents": n, "tokens": tokens, "crc32": zlib.crc32(b"".join(ids[some] + rows[some]))}
            for n, tokens, some in ((2, 6, slice(0, 2)), (1, 11, slice(2, 3)), (2, 5, slice(3, 5)))
        ],
        "complete": True,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{NAME}.{end}" for end in ("docs", "ids", "json")]
    assert read_record(tmp_path, NAME, PLAN) == record


def test_blocks_come_back_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "BLOCK_TOKENS", 6)
    found = list(read_blocks(tmp_path, write(tmp_path)))
    assert [ids.tolist() for _, ids in found] == [
        [id for document in some for id in document] for some in (DOCUMENTS[:2], DOCUMENTS[2:3], DOCUMENTS[3:])
    ]
    rows = np.concatenate([rows for rows, _ in found])
    assert rows["tokens"].tolist() == [len(document) for document in DOCUMENTS]
    digests = [hashlib.sha256(bytes(document[1:])).hexdigest() for document in DOCUMENTS]
    assert [f"{''.join(f'{word:016x}' for word in row)}" for row in rows["digest"].tolist()] == digests


def test_an_empty_part(tmp_path):
    record = PartWriter(tmp_path, UNIT, PLAN).finish(**COUNTS)
    assert record.documents == record.tokens == 0 and record.blocks == ()
    assert read_record(tmp_path, NAME, PLAN) == record
    assert list(read_blocks(tmp_path, record)) == []


def test_records_that_do_not_count(tmp_path):
    assert read_record(tmp_path, NAME, PLAN) is None
    record = write(tmp_path)
    assert read_record(tmp_path, NAME, "cd" * 32) is None
    file = tmp_path / f"{NAME}.json"
    file.rename(tmp_path / "000003-000013.json")
    for ending in ("ids", "docs"):
        (tmp_path / f"000003-000013.{ending}").write_bytes((tmp_path / f"{NAME}.{ending}").read_bytes())
    assert read_record(tmp_path, "000003-000013", PLAN) is None  # the record of another
    for damaged in ("", "{", "[]", "{}", record.model_dump_json().replace("true", "false"), "\ud800"):
        file.write_bytes(damaged.encode("utf-8", "surrogatepass"))
        assert read_record(tmp_path, NAME, PLAN) is None, damaged


@pytest.mark.parametrize("ending", ["ids", "docs"])
def test_files_of_another_size_do_not_count(tmp_path, ending):
    record, file = write(tmp_path), tmp_path / f"{NAME}.{ending}"
    data = file.read_bytes()
    for wrong in (data[:-1], data + b"\0", b""):
        file.write_bytes(wrong)
        assert read_record(tmp_path, NAME, PLAN) is None
    file.write_bytes(data)
    assert read_record(tmp_path, NAME, PLAN) == record
    file.unlink()
    assert read_record(tmp_path, NAME, PLAN) is None


@pytest.mark.parametrize("ending", ["ids", "docs"])
@pytest.mark.parametrize("byte", [0, -1])
def test_damage_is_found_in_every_block(tmp_path, monkeypatch, ending, byte):
    monkeypatch.setattr(parts, "BLOCK_TOKENS", 6)
    record, file = write(tmp_path), tmp_path / f"{NAME}.{ending}"
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)
    whole = 0 if byte == 0 else 2
    blocks = read_blocks(tmp_path, record)
    for _ in range(whole):
        next(blocks)
    with pytest.raises(UserError, match=rf"{NAME}\.ids: damaged; delete {NAME}.json .*--resume"):
        next(blocks)


def test_files_that_are_gone_or_short_are_an_error(tmp_path):
    record, file = write(tmp_path), tmp_path / f"{NAME}.docs"
    file.write_bytes(file.read_bytes()[:-36])
    with pytest.raises(UserError, match="damaged"):
        list(read_blocks(tmp_path, record))
    file.unlink()
    with pytest.raises(UserError, match=rf"{NAME}\.docs: is gone; go on with --resume"):
        list(read_blocks(tmp_path, record))


def test_the_record_is_written_last(tmp_path, monkeypatch):
    """Until it is, there is no part; and then its files are on the disk."""
    synced = []
    monkeypatch.setattr(parts.os, "fsync", lambda number: synced.append(parts.os.readlink(f"/proc/self/fd/{number}")))
    replace = parts.os.replace

    def replacing(source, target):
        assert [path.rpartition(".")[2] for path in synced] == ["ids", "docs", "partial"]
        assert read_record(tmp_path, NAME, PLAN) is None
        replace(source, target)

    monkeypatch.setattr(parts.os, "replace", replacing)
    write(tmp_path)
    assert read_record(tmp_path, NAME, PLAN) is not None


def test_remains_are_overwritten_and_discarded(tmp_path):
    write(tmp_path)
    for ending in ("ids", "docs"):
        (tmp_path / f"{NAME}.{ending}").write_bytes(b"x" * 10_000)
    writer = PartWriter(tmp_path, UNIT, PLAN)
    assert not (tmp_path / f"{NAME}.json").exists()
    append(writer, DOCUMENTS)
    writer.discard()
    assert list(tmp_path.iterdir()) == []
    for ending in ("ids", "docs", "json.partial"):
        (tmp_path / f"{NAME}.{ending}").write_bytes(b"x" * 10_000)
    write(tmp_path)
    assert read_record(tmp_path, NAME, PLAN).tokens == 22
