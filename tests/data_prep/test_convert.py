import hashlib
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from other_projects import (
    END_OF_TEXT,
    LlmcDataLoader,
    MegatronIndexedDataset,
    documents_beginning,
    documents_ending,
    megatron_index,
    modded_load_data_shard,
    nanogpt_data,
    nanogpt_get_batch,
    shard_bytes,
    write_megatron,
)

from data_prep.__main__ import main
from data_prep.adopt import adopt
from data_prep.convert import Conversion, convert
from data_prep.formats import ids, megatron
from data_prep.manifest import verify_shards
from megaresid.data.manifest import Counts, load_manifest
from megaresid.data.shards import TokenStream
from megaresid.errors import UserError

DOCUMENTS = {"train": [[1, 2, 3], [], [4], [5, 50255, 0, 6, 6, 6, 6, 6]], "val": [[7, 8], [9]]}
documents = st.lists(st.lists(st.integers(0, 50255), max_size=6), min_size=1, max_size=8)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture(params=[2, 10**6], ids=["small blocks", "large blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(ids, "BLOCK_IDS", request.param)
    monkeypatch.setattr(megatron, "AT_ONCE", request.param)


def batched(tokens, size):
    return [tokens[first : first + size] for first in range(0, len(tokens), size)]


def beginning(documents):
    return [token for document in documents for token in [END_OF_TEXT, *document]]


def ending(documents):
    return [token for document in documents for token in [*document, END_OF_TEXT]]


def write_data_set(folder, splits, shard_tokens=5):
    """Shards by the definition, given a manifest. ``splits``: the ids of each."""
    folder.mkdir()
    for split, tokens in splits.items():
        for n, part in enumerate(batched(tokens, shard_tokens)):
            (folder / f"{split}_{n:06d}.bin").write_bytes(shard_bytes(part))
    adopt(folder)
    return folder


def write_nanogpt(folder, documents_of):
    """As nanoGPT's prepare.py does: all documents' ids one after another, <|endoftext|> after each."""
    folder.mkdir()
    for split, documents in documents_of.items():
        (folder / f"{split}.bin").write_bytes(np.array(ending(documents), np.uint16).tobytes())
    return folder


def write_megatron_folder(folder, documents_of, **options):
    folder.mkdir()
    for split, documents in documents_of.items():
        write_megatron(folder / f"my-gpt2_{split}_text_document", [[document] for document in documents], **options)
    return folder


WRITERS = {"nanogpt": write_nanogpt, "megatron": write_megatron_folder}


def conversions(data, theirs, out, form):
    """There, of a data set, and back, of the other project's files."""
    return Conversion(data, out, to=form), Conversion(theirs, out, origin=form)


def tokens_of(folder):
    """The ids of each split, by reading the shards as modded-nanogpt does."""
    splits = {}
    for path in sorted(folder.glob("*.bin")):
        splits.setdefault(path.name.split("_")[0], []).extend(modded_load_data_shard(path).tolist())
    return splits


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json"}


@pytest.fixture
def data(tmp_path):
    return write_data_set(tmp_path / "data", {split: beginning(documents) for split, documents in DOCUMENTS.items()})


def test_nanogpt_reads_the_same_documents(data, tmp_path, blocks):
    done = convert(Conversion(data, tmp_path / "out", to="nanogpt"))
    for split, documents in DOCUMENTS.items():
        tokens = nanogpt_data(tmp_path / "out", split)
        assert documents_ending(tokens.tolist()) == documents
        assert done.splits[split] == Counts(documents=len(documents), tokens=len(tokens))
        x, y = nanogpt_get_batch(tokens, range(len(tokens) - 3), 3)
        assert x[:, 1:].tolist() == y[:, :-1].tolist()
        assert x[:, 0].tolist() == ending(documents)[:-3] and y[:, -1].tolist() == ending(documents)[3:]
    assert sorted(contents(tmp_path / "out")) == ["train.bin", "val.bin"]


def test_megatron_reads_the_same_documents(data, tmp_path, blocks):
    done = convert(Conversion(data, tmp_path / "out", to="megatron"))
    for split, documents in DOCUMENTS.items():
        indexed = MegatronIndexedDataset(tmp_path / "out" / split)
        assert indexed.dtype == np.uint16
        assert [indexed.get(n).tolist() for n in range(len(indexed))] == [[*doc, END_OF_TEXT] for doc in documents]
        assert indexed.document_indices.tolist() == list(range(len(documents) + 1))
        assert done.splits[split] == Counts(documents=len(documents), tokens=sum(indexed.sequence_lengths))
    assert MegatronIndexedDataset(tmp_path / "out" / "train").get(3, 1, 3).tolist() == [50255, 0, 6]
    assert sorted(contents(tmp_path / "out")) == ["train.bin", "train.idx", "val.bin", "val.idx"]


def test_megatron_files_are_what_its_builder_writes(data, tmp_path, blocks):
    convert(Conversion(data, tmp_path / "out", to="megatron"))
    write_megatron(tmp_path / "theirs", [[document] for document in DOCUMENTS["train"]])
    for suffix in "bin", "idx":
        assert (tmp_path / "out" / f"train.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


@pytest.mark.parametrize("origin", ["nanogpt", "megatron"])
def test_data_set_by_definition(origin, tmp_path, blocks):
    theirs = WRITERS[origin](tmp_path / "theirs", DOCUMENTS)
    done = convert(Conversion(theirs, tmp_path / "out", origin=origin, shard_tokens=5))
    manifest = load_manifest(tmp_path / "out")
    assert done.manifest == manifest
    streams = {split: beginning(documents) for split, documents in DOCUMENTS.items()}
    shards = {f"{split}_{n:06d}.bin": part for split in streams for n, part in enumerate(batched(streams[split], 5))}
    assert contents(tmp_path / "out") == {name: shard_bytes(part) for name, part in shards.items()}
    content = manifest.content
    joined = [*streams["train"], *streams["val"]]
    revision = hashlib.sha256(struct.pack(f"<{len(joined)}H", *joined)).hexdigest()
    assert (content.source.kind, content.source.revision) == (origin, f"sha256:{revision}")
    assert (content.options.shard_tokens, content.options.validation_fraction) == (5, None)
    counts = {split: Counts(documents=len(DOCUMENTS[split]), tokens=len(streams[split])) for split in streams}
    assert content.splits == counts == done.splits
    assert [shard.largest_id for shard in content.shards] == [max(part) for part in shards.values()]
    assert [problem for _, problem in verify_shards(tmp_path / "out", manifest)] == [None] * len(shards)
    for split in streams:
        stream = TokenStream.open(tmp_path / "out", manifest, split)
        assert stream.read(0, len(stream)).tolist() == streams[split]


def test_llmc_and_modded_nanogpt_read_our_shards(tmp_path):
    theirs = write_nanogpt(tmp_path / "theirs", {"train": [[n] * (n % 5) for n in range(40)], "val": [[1]]})
    convert(Conversion(theirs, tmp_path / "out", origin="nanogpt", shard_tokens=50))
    stream = beginning([n] * (n % 5) for n in range(40))
    shards = [list(part) for part in batched(stream, 50)]
    paths = sorted((tmp_path / "out").glob("train_*.bin"))
    assert [modded_load_data_shard(path).tolist() for path in paths] == shards
    for rank in range(2):
        loader = LlmcDataLoader(str(tmp_path / "out" / "train_*.bin"), batch=2, context=4, rank=rank, ranks=2)
        assert loader.tokens == len(stream)
        # One epoch and the first batch of the next.
        starts = [(shard, n * 16 + rank * 8) for shard in shards for n in range((len(shard) - 1) // 16)]
        for shard, start in [*starts, starts[0]]:
            assert loader.next_batch() == (shard[start : start + 8], shard[start + 1 : start + 9])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    train=documents,
    val=documents,
    origin=st.sampled_from(["nanogpt", "megatron"]),
    block=st.integers(1, 9),
    at_once=st.integers(1, 5),
    shard_tokens=st.integers(1, 9),
)
def test_there_and_back_is_the_same_bytes(train, val, origin, block, at_once, shard_tokens):
    with tempfile.TemporaryDirectory() as name, patched(block, at_once):
        folder = Path(name)
        streams = {"train": beginning(train), "val": beginning(val)}
        data = write_data_set(folder / "data", streams, shard_tokens)
        there = convert(Conversion(data, folder / "there", to=origin))
        back = convert(Conversion(folder / "there", folder / "back", origin=origin, shard_tokens=shard_tokens))
        assert contents(folder / "back") == contents(data)
        assert there.splits == back.splits
        convert(Conversion(folder / "back", folder / "again", to=origin))
        assert contents(folder / "again") == contents(folder / "there")
        assert documents_ending(np.fromfile(folder / "there" / "val.bin", np.uint16).tolist()) == val


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 50256), max_size=4), max_size=3), min_size=1, max_size=8),
    append_eod=st.booleans(),
    dtype_code=st.sampled_from([4, 8]),
    block=st.integers(1, 9),
    at_once=st.integers(1, 5),
)
def test_any_megatron_documents(documents, append_eod, dtype_code, block, at_once):
    """Of sentences, without tokens, without <|endoftext|>, with it within."""
    expected = []
    for sequences in documents:
        tokens = [token for sequence in sequences for token in sequence]
        tokens += [END_OF_TEXT] if append_eod and sequences else []
        if tokens:
            expected += tokens if tokens[-1] == END_OF_TEXT else [*tokens, END_OF_TEXT]
    with tempfile.TemporaryDirectory() as name, patched(block, at_once):
        folder = Path(name)
        (folder / "theirs").mkdir()
        write_megatron(folder / "theirs" / "train", documents, append_eod, dtype_code)
        conversion = Conversion(folder / "theirs", folder / "out", origin="megatron")
        if not expected:
            with pytest.raises(UserError, match="train.bin: has no tokens"):
                convert(conversion)
            assert not (folder / "out").exists()
            return
        convert(conversion)
        assert documents_beginning(tokens_of(folder / "out")["train"]) == documents_ending(expected)


@contextmanager
def patched(block, at_once):
    """Small reads, also within one test that hypothesis repeats."""
    with patch.object(ids, "BLOCK_IDS", block), patch.object(megatron, "AT_ONCE", at_once):
        yield


def test_several_megatron_files_of_a_split_follow_by_name(tmp_path, blocks):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name, documents in ("c_train", [[3]]), ("b_train", [[1], [2]]), ("a_val", [[4]]):
        write_megatron(folder / name, [[document] for document in documents], append_eod=name != "b_train")
    done = convert(Conversion(folder, tmp_path / "out", origin="megatron"))
    assert {s: documents_beginning(t) for s, t in tokens_of(tmp_path / "out").items()} == {
        "train": [[1], [2], [3]],
        "val": [[4]],
    }
    assert [shard.split for shard in done.manifest.content.shards] == ["train", "val"]


def test_a_split_that_begins_within_a_document(tmp_path, blocks):
    """As adopted shards do: what is left of the document is one."""
    streams = {"train": [1, 2, END_OF_TEXT, 3], "val": [END_OF_TEXT, 4, 1]}
    data = write_data_set(tmp_path / "data", streams)
    done = convert(Conversion(data, tmp_path / "out", to="megatron"))
    assert documents_ending(nanogpt_data(tmp_path / "out", "train").tolist()) == [[1, 2], [3]]
    assert done.splits["train"] == Counts(documents=2, tokens=5)


def test_a_nanogpt_file_without_end_of_text(tmp_path, blocks):
    """As of its Shakespeare: one document, and one split only."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "train.bin").write_bytes(np.array([1, 2, 3], np.uint16).tobytes())
    done = convert(Conversion(tmp_path / "theirs", tmp_path / "out", origin="nanogpt"))
    assert tokens_of(tmp_path / "out") == {"train": [END_OF_TEXT, 1, 2, 3]}
    assert done.splits == {"train": Counts(documents=1, tokens=4)}


def test_reports_how_far_it_is(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ids, "BLOCK_IDS", 2)
    for conversion in (
        Conversion(data, tmp_path / "there", to="megatron"),
        Conversion(tmp_path / "there", tmp_path / "back", origin="megatron"),
    ):
        reports = []
        convert(conversion, lambda *report: reports.append(report))
        assert reports == sorted(reports) and reports[0][0] < 0.5 and reports[-1][0] == 1.0
        assert reports[-1][1] in (5, 6)


def test_the_command(data, tmp_path, capsys):
    there, back = str(tmp_path / "there"), tmp_path / "back"
    main(["convert", str(data), "--to", "megatron", "--out", there])
    assert "train: 4 documents, 16 tokens\nval: 2 documents, 5 tokens\n" in capsys.readouterr().out
    main(["convert", there, "--from", "megatron", "--out", str(back), "--shard-tokens", "5"])
    said = capsys.readouterr().out
    assert "train: 4 documents, 16 tokens, 4 shard(s)\nval: 2 documents, 5 tokens, 1 shard(s)\n" in said
    assert contents(back) == contents(data)
    with pytest.raises(SystemExit) as end:
        main(["convert", str(data), "--from", "nanogpt", "--out", str(tmp_path / "c")])
    assert end.value.code == 2 and "no train.bin or val.bin in it" in capsys.readouterr().err


def test_the_options_as_typed():
    line = ["old", "--from", "nanogpt", "--out", "new", "--shard-tokens", "7"]
    assert tyro.cli(Conversion, args=line) == Conversion(Path("old"), Path("new"), origin="nanogpt", shard_tokens=7)
    line = ["old", "--to", "megatron", "--out", "new"]
    assert tyro.cli(Conversion, args=line) == Conversion(Path("old"), Path("new"), to="megatron")


GOOD = struct.pack("<4H", 1, 2, END_OF_TEXT, 3)
BAD_NANOGPT = {
    "odd": (GOOD[:-1], "7 bytes are no whole number of 2-byte ids"),
    "empty": (b"", "0 bytes are no whole number"),
    "id": (struct.pack("<5H", 1, 2, 3, 4, 50257), "token 4 is id 50257, outside GPT-2's vocabulary of 50257"),
    "llm.c's shard": (shard_bytes([END_OF_TEXT, 1]), "a shard of llm.c's form; python -m data_prep adopt"),
    "Llama 3's shard": (shard_bytes([1, 2], magic=20240801, version=7), "Llama 3"),
    "build-nanogpt's": (b"\x93NUMPY\x01\x00" + GOOD, "an array of numpy's"),
}


@pytest.mark.parametrize("case", BAD_NANOGPT)
def test_refuses_what_is_not_nanogpts(case, tmp_path, blocks):
    content, says = BAD_NANOGPT[case]
    theirs = write_nanogpt(tmp_path / "theirs", DOCUMENTS)
    (theirs / "val.bin").write_bytes(content)
    refuses(Conversion(theirs, tmp_path / "out", origin="nanogpt"), "val.bin: ", says)


LENGTHS, POINTERS, INDICES = [2, 1, 3], [0, 4, 6], [0, 1, 1, 3]
INDEX = megatron_index(LENGTHS, POINTERS, INDICES)
BAD_INDEX = {
    "empty": (b"", "not an index of Megatron's"),
    "magic": (megatron_index(LENGTHS, POINTERS, INDICES, magic=b"MMIDIDX\0\1"), "not an index of Megatron's"),
    "version": (megatron_index(LENGTHS, POINTERS, INDICES, version=2), "version 2"),
    "int64": (megatron_index(LENGTHS, POINTERS, INDICES, dtype_code=5), "of type int64"),
    "no type": (megatron_index(LENGTHS, POINTERS, INDICES, dtype_code=9), "of type code 9"),
    "int32 for uint16": (megatron_index(LENGTHS, POINTERS, INDICES, dtype_code=4), "1 tokens from byte 4"),
    "within the header": (INDEX[:33], "cut short within its header"),
    "within a table": (INDEX[:-1], f"cut short, {len(INDEX) - 1} bytes where 3 sequences and 4 entries"),
    "longer": (INDEX + b"\0", "too long"),
    "modes": (INDEX + bytes(3), "multimodal"),
    "endless counts": (INDEX[:18] + struct.pack("<QQ", 2**63, 2**63) + INDEX[34:], "cut short"),
    "gap": (megatron_index(LENGTHS, [0, 4, 8], INDICES), "sequence 2 has 3 tokens from byte 8"),
    "overlap": (megatron_index(LENGTHS, [0, 2, 6], INDICES), "sequence 1 has 1 tokens from byte 2"),
    "late start": (megatron_index(LENGTHS, [2, 6, 8], INDICES), "sequence 0 has 2 tokens from byte 2"),
    "negative": (megatron_index([2, -1, 5], [0, 4, 2], INDICES), "sequence 1 has -1 tokens"),
    "more than there is": (megatron_index([2, 1, 4], POINTERS, INDICES), "12 bytes where x_val.idx says 14"),
    "less than there is": (megatron_index([2, 1, 2], POINTERS, INDICES), "12 bytes where x_val.idx says 10"),
    "documents not from 0": (megatron_index(LENGTHS, POINTERS, [1, 1, 1, 3]), "do not lead from sequence 0 to 3"),
    "documents back": (megatron_index(LENGTHS, POINTERS, [0, 2, 1, 3]), "do not lead from sequence 0 to 3"),
    "documents short": (megatron_index(LENGTHS, POINTERS, [0, 1, 1, 2]), "do not lead from sequence 0 to 3"),
    "documents beyond": (megatron_index(LENGTHS, POINTERS, [0, 1, 1, 4]), "do not lead from sequence 0 to 3"),
    "no documents": (megatron_index(LENGTHS, POINTERS, []), "do not lead from sequence 0 to 3"),
}


def write_indexed(folder, index, tokens=(1, 2, 3, 4, 5, 6), dtype="<u2"):
    folder.mkdir()
    (folder / "x_val.idx").write_bytes(index)
    (folder / "x_val.bin").write_bytes(np.array(tokens, dtype).tobytes())
    return folder


def test_the_good_index_is_read(tmp_path, blocks):
    convert(Conversion(write_indexed(tmp_path / "theirs", INDEX), tmp_path / "out", origin="megatron"))
    assert documents_beginning(tokens_of(tmp_path / "out")["val"]) == [[1, 2], [3, 4, 5, 6]]


@pytest.mark.parametrize("case", BAD_INDEX)
def test_refuses_a_damaged_index(case, tmp_path, blocks):
    index, says = BAD_INDEX[case]
    refuses(Conversion(write_indexed(tmp_path / "theirs", index), tmp_path / "out", origin="megatron"), "x_val.", says)


@pytest.mark.parametrize("bad", [50257, -1, 2**31 - 1])
def test_refuses_ids_of_another_vocabulary(bad, tmp_path, blocks):
    index = megatron_index(LENGTHS, [0, 8, 12], INDICES, dtype_code=4)
    theirs = write_indexed(tmp_path / "theirs", index, (1, 2, 3, 4, bad, 6), "<i4")
    refuses(Conversion(theirs, tmp_path / "out", origin="megatron"), "x_val.bin: ", f"token 4 is id {bad}")


def test_refuses_folders_that_hold_something_else(data, tmp_path):
    theirs = write_megatron_folder(tmp_path / "megatron", DOCUMENTS)
    out = tmp_path / "out"
    refuses(Conversion(tmp_path / "none", out, origin="nanogpt"), "none: ", "no such folder")
    refuses(Conversion(theirs, out, origin="nanogpt"), "megatron: ", "no train.bin or val.bin in it")
    refuses(Conversion(theirs, out, to="nanogpt"), "megatron: ", "not a data set")
    refuses(Conversion(data, out, origin="megatron"), "train_000000.idx: ", "missing")
    (tmp_path / "empty").mkdir()
    refuses(Conversion(tmp_path / "empty", out, origin="megatron"), "empty: ", "no .bin and .idx in it")
    write_megatron(theirs / "x", [[[1]]])
    refuses(Conversion(theirs, out, origin="megatron"), "x.bin: ", "neither train nor val")
    (theirs / "x.bin").unlink()
    refuses(Conversion(theirs, out, origin="megatron"), "x.bin: ", "missing")
    characters = write_nanogpt(tmp_path / "characters", DOCUMENTS)
    (characters / "meta.pkl").write_bytes(b"")
    refuses(Conversion(characters, out, origin="nanogpt"), "meta.pkl: ", "vocabulary of their own")


def test_refuses_options_that_contradict(data, tmp_path):
    out = tmp_path / "out"
    refuses(Conversion(data, out), "convert", "either --to or --from")
    refuses(Conversion(data, out, to="nanogpt", origin="megatron"), "convert", "either --to or --from")
    for tokens in 0, 2**31:
        refuses(Conversion(data, out, to="nanogpt", shard_tokens=tokens), "--shard-tokens", str(tokens))


@pytest.mark.parametrize("origin", ["nanogpt", "megatron"])
def test_nothing_is_overwritten(origin, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.bin").write_bytes(b"mine")
    theirs = WRITERS[origin](tmp_path / "theirs", DOCUMENTS)
    for conversion in conversions(data, theirs, out, origin):
        with pytest.raises(UserError, match="out: not empty"):
            convert(conversion)
    for conversion in Conversion(data, data, to=origin), Conversion(theirs, theirs, origin=origin):
        with pytest.raises(UserError, match="not empty"):
            convert(conversion)
    with pytest.raises(UserError, match="train.bin: is a file"):
        convert(Conversion(data, out / "train.bin", to=origin))
    assert contents(out) == {"train.bin": b"mine"}


@pytest.mark.parametrize("origin", ["nanogpt", "megatron"])
def test_a_damaged_shard_is_found_and_nothing_is_left(origin, data, tmp_path):
    shard = data / "val_000000.bin"
    shard.write_bytes(shard_bytes([END_OF_TEXT, 7, 8, END_OF_TEXT, 10]))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="val_000000.bin: damaged, its sha256 is not the one in the manifest"):
        convert(Conversion(data, tmp_path / "out", to=origin))
    assert not contents(tmp_path / "out")
    shard.unlink()
    refuses(Conversion(data, tmp_path / "new", to=origin), "val_000000.bin: ", "missing")


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("origin", ["nanogpt", "megatron"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_conversion_leaves_nothing(origin, stop, data, tmp_path):
    theirs = WRITERS[origin](tmp_path / "theirs", DOCUMENTS)
    for conversion in conversions(data, theirs, tmp_path / "out", origin):
        report = Mock(side_effect=[None] * (stop - 1) + [Interrupt])
        with patch.object(ids, "BLOCK_IDS", 8), pytest.raises(Interrupt):
            convert(conversion, report)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("origin", ["nanogpt", "megatron"])
def test_what_the_disk_refuses(origin, data, tmp_path):
    theirs = WRITERS[origin](tmp_path / "theirs", DOCUMENTS)
    for conversion in conversions(data, theirs, tmp_path / "out", origin):
        with patch("os.fsync", side_effect=OSError(28, "No space left on device")):
            refuses(conversion, "out: ", "No space left on device; mend that and start again")


def test_megatron_has_lengths_of_31_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "MOST_LENGTH", 3)
    for length in 2, 3:
        data = write_data_set(tmp_path / f"data{length}", {"train": [END_OF_TEXT, *[1] * length]})
        if length == 2:
            convert(Conversion(data, tmp_path / "out2", to="megatron"))
        else:
            refuses(Conversion(data, tmp_path / "out3", to="megatron"), "train: ", "a document of 4 tokens")


def refuses(conversion, where, says):
    """One line that names the file or option; nothing is left."""
    with pytest.raises(UserError) as error:
        convert(conversion)
    message = str(error.value)
    assert where in message and says in message and "\n" not in message
    assert not conversion.out.exists()
