import hashlib
import random
import shutil
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts_by_hand import PLAN, Part, expected, parts_of, read_shards, write_part

from data_prep.assemble import Assembler, Cut, runs_of
from data_prep.parts import read_record
from megaresid.errors import UserError


def assemble(folder, parts, block_documents=2, **options):
    """Write the parts, assemble them; (what was assembled, how many parts were asked for)."""
    shutil.rmtree(folder, ignore_errors=True)
    out = folder / "out"
    out.mkdir(parents=True)
    for part in parts:
        write_part(folder / "parts", part, block_documents=block_documents)
    used = 0
    with Assembler(out, out / "parts", Cut(**options)) as assembler:
        for part in parts:
            used += 1
            if not assembler.add(read_record(folder / "parts", part.name, PLAN), folder / "parts"):
                break
        return assembler.finish(), used


def check(folder, parts, block_documents=2, shard_tokens=10, **options):
    made, used = assemble(folder, parts, block_documents, shard_tokens=shard_tokens, **options)
    want = expected(parts, **options)
    out = folder / "out"
    for split, ids in want.ids.items():
        assert read_shards(out, split) == [ids[at : at + shard_tokens] for at in range(0, len(ids), shard_tokens)]
        assert made.splits[split].model_dump() == {"documents": want.documents[split], "tokens": len(ids)}
    names = [entry.name for entry in made.shards]
    assert names == sorted(names) and {path.name for path in out.glob("*.bin")} == set(names)
    for entry in made.shards:
        data = (out / entry.name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (made.documents_sha256, made.limited, used) == (want.documents_sha256, want.limited, want.parts_used)
    assert made.dropped["duplicates"] == want.duplicates
    return made


texts = st.sampled_from([b"%d" % number for number in range(12)])
documents = st.lists(st.tuples(texts, st.lists(st.integers(0, 65535), max_size=6)), max_size=25)


@settings(deadline=None, max_examples=120)
@given(
    documents,
    st.lists(st.integers(0, 7), max_size=6),
    st.integers(1, 4),
    st.sampled_from([0.05, 0.5, 0.95]),
    st.booleans(),
    st.none() | st.integers(1, 60),
)
def test_one_document_after_another(tmp_path_factory, documents, lengths, block, fraction, deduplicate, limit):
    rest = max(0, len(documents) - sum(lengths))
    parts = parts_of(documents, [*lengths, rest])
    options = dict(validation_fraction=fraction, deduplicate=deduplicate, limit_tokens=limit)
    check(tmp_path_factory.getbasetemp() / "assembled", parts, block, **options)


def made_documents(number, length=6):
    return [(b"text %d" % n, [n, *range(n % length)]) for n in range(number)]


def test_parts_and_blocks_change_nothing(tmp_path):
    documents = made_documents(200) + made_documents(50)
    options = dict(validation_fraction=0.3, deduplicate=True, limit_tokens=700)
    shards = []
    for lengths, block in (([250], 250), ([100, 0, 150], 7), ([1] * 250, 1)):
        made = check(tmp_path, parts_of(documents, lengths), block, shard_tokens=64, **options)
        shards.append((made.shards, made.documents_sha256, made.splits, made.dropped))
    assert shards[0] == shards[1] == shards[2]


@pytest.mark.parametrize("spare, taken, limited", [(-1, 9, True), (0, 10, False), (1, 10, False)])
def test_the_limit_is_met_exactly(tmp_path, spare, taken, limited):
    documents = [(b"%d" % n, [1, 2]) for n in range(10)]
    made = check(tmp_path, parts_of(documents, [4, 6]), validation_fraction=0.5, limit_tokens=30 + spare)
    assert (sum(counts.documents for counts in made.splits.values()), made.limited) == (taken, limited)


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_duplicates_do_not_count_for_the_limit(tmp_path, block):
    documents = [(b"same", [1, 2]), (b"same", [1, 2]), (b"other", [3, 4]), (b"same", [1, 2]), (b"more", [5, 6])]
    options = dict(validation_fraction=0.5, deduplicate=True, limit_tokens=6)
    made = check(tmp_path, parts_of(documents, [5]), block, **options)
    assert made.limited and made.dropped["duplicates"] == 1
    assert sum(counts.tokens for counts in made.splits.values()) == 6
    digests = b"".join(hashlib.sha256(text).digest() for text in (b"same", b"same", b"other"))
    assert made.documents_sha256 == hashlib.sha256(digests).hexdigest()


def test_the_bound_between_the_splits_is_exact(tmp_path):
    """A half is 2^63 as a first word, big-endian: that one is for training, the one before it is held out."""
    write_part(tmp_path / "parts", Part([(b"a", [1]), (b"b", [2]), (b"c", [3]), (b"d", [4])]), block_documents=4)
    rows, ids, words = b"", b"", (2**63, 2**63 - 1, 0, 2**64 - 1)
    for number, word in enumerate(words, 1):
        rows += word.to_bytes(8, "big") + b"\xff" * 24 + struct.pack("<I", 2)
        ids += struct.pack("<2H", 50256, number)
    (tmp_path / "parts" / "000000-000000.docs").write_bytes(rows)
    record = read_record(tmp_path / "parts", "000000-000000", PLAN)
    block = record.blocks[0].model_copy(update={"crc32": zlib.crc32(ids + rows)})
    with Assembler(tmp_path, tmp_path / "parts", Cut(100, 0.5)) as assembler:
        assembler.add(record.model_copy(update={"blocks": (block,)}), tmp_path / "parts")
        assembler.finish()
    assert read_shards(tmp_path, "val") == [[50256, 2, 50256, 3]]
    assert read_shards(tmp_path, "train") == [[50256, 1, 50256, 4]]


def test_the_first_of_the_same_texts_is_kept_whatever_its_ids(tmp_path):
    made = check(
        tmp_path, parts_of([(b"a", [1]), (b"a", [2]), (b"b", [3])], [1, 2]), validation_fraction=0.5, deduplicate=True
    )
    assert sum(counts.tokens for counts in made.splits.values()) == 4


def test_counts_of_the_parts_add_up_to_the_one_where_the_limit_fell(tmp_path):
    parts = parts_of(made_documents(9), [3, 3, 3])
    for number, part in enumerate(parts):
        part.dropped, part.runs_cut, part.proven_bytes = {"empty": 10**number, "bad_rows": number}, 10**number, 1
        part.backend = ("gigatoken", "tiktoken", "never")[number]
    made = check(tmp_path, parts, validation_fraction=0.5, limit_tokens=14)
    assert made.dropped == {"empty": 11, "bad_rows": 1, "duplicates": 0} and made.runs_cut == 11
    assert (made.backends, made.proven_bytes) == (("gigatoken", "tiktoken"), 2)


def test_a_part_after_the_limit_is_not_taken(tmp_path):
    parts = parts_of(made_documents(6), [3, 3])
    for part in parts:
        record = write_part(tmp_path / "parts", part)
    with Assembler(tmp_path, tmp_path / "parts", Cut(10, 0.5, limit_tokens=record["tokens"] - 1)) as assembler:
        records = [read_record(tmp_path / "parts", part.name, PLAN) for part in parts]
        assert [assembler.add(record, tmp_path / "parts") for record in (records[1], records[0])] == [False, False]
        assert assembler.documents < 3 and assembler.finish().limited


def test_long_documents_run_over_shards(tmp_path):
    numbers = random.Random(0)
    documents = [(b"%d" % n, [numbers.randrange(65536) for _ in range(300 * n)]) for n in range(6)]
    check(tmp_path, parts_of(documents, [2, 4]), shard_tokens=100, validation_fraction=0.4)


def test_a_damaged_part_leaves_no_shards(tmp_path):
    write_part(tmp_path / "parts", Part(made_documents(40)))
    path = tmp_path / "parts" / "000000-000000.ids"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    record = read_record(tmp_path / "parts", "000000-000000", PLAN)
    with pytest.raises(UserError, match="000000-000000.*--resume"):
        with Assembler(tmp_path, tmp_path / "parts", Cut(10, 0.5, deduplicate=True)) as assembler:
            assembler.add(record, tmp_path / "parts")
    assert not list(tmp_path.glob("*.bin")) and not (tmp_path / "parts" / "seen").exists()


def test_digests_that_were_seen_take_no_place_afterwards(tmp_path):
    check(tmp_path, parts_of(made_documents(5), [5]), validation_fraction=0.5, deduplicate=True)
    assert not (tmp_path / "out" / "parts" / "seen").exists()


@given(chosen=st.lists(st.booleans(), max_size=12))
def test_runs_by_definition(chosen):
    runs = [tuple(run) for run in runs_of(np.array(chosen, bool)).tolist()]
    inside = [any(start <= n < end for start, end in runs) for n in range(len(chosen))]
    assert inside == chosen and all(start < end for start, end in runs)
    assert all(before[1] < after[0] for before, after in zip(runs, runs[1:], strict=False))
