import dataclasses
import hashlib
import json
import signal
import struct
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from data_prep import pipeline, writer
from data_prep.__main__ import main
from data_prep.pipeline import Job, prepare
from data_prep.tokenizer import gpt2_encoding
from megaresid.data.manifest import load_manifest
from megaresid.errors import UserError

DOCUMENTS = [f"Document {n} says {'very ' * (n % 7)}little. {n * n}" for n in range(120)] + ["<|endoftext|>", "日本語"]


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", DOCUMENTS)


def write_rows(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def job(rows, out, **options):
    defaults = dict(source="jsonl", input=(str(rows),), shard_tokens=100, validation_fraction=0.2, workers=1)
    return Job(out=out, **defaults | options)


def read_shard(path):
    data = path.read_bytes()
    magic, version, tokens, *rest = struct.unpack("<256i", data[:1024])
    assert (magic, version, set(rest)) == (20240520, 1, {0})
    return list(struct.unpack(f"<{tokens}H", data[1024:]))


def expected_tokens(documents, fraction):
    """By definition: each document after 50256, to val where its hash as a fraction of 1 is below the fraction."""
    encoding, result = gpt2_encoding(), {"train": [], "val": []}
    for text in documents:
        position = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64
        result["val" if position < fraction else "train"] += [50256, *encoding.encode_ordinary(text)]
    return result


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


def test_shards_and_manifest_by_definition(rows, tmp_path):
    out = tmp_path / "made" / "out"
    manifest = prepare(job(rows, out))
    assert load_manifest(out) == manifest
    written = json.loads((out / "manifest.json").read_text())["content"]
    names = []
    for split, tokens in expected_tokens(DOCUMENTS, 0.2).items():
        parts = [tokens[start : start + 100] for start in range(0, len(tokens), 100)]
        assert len(parts) > 1
        for number, part in enumerate(parts):
            name = f"{split}_{number:06d}.bin"
            names.append(name)
            assert read_shard(out / name) == part
            assert {
                "name": name,
                "split": split,
                "tokens": len(part),
                "bytes": (out / name).stat().st_size,
                "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest(),
                "largest_id": max(part),
            } in written["shards"]
        assert written["splits"][split] == {"documents": tokens.count(50256), "tokens": len(tokens)}
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "manifest.json"])
    digests = b"".join(hashlib.sha256(text.encode()).digest() for text in DOCUMENTS)
    assert written["source"] == {"kind": "jsonl", "revision": f"sha256:{hashlib.sha256(digests).hexdigest()}"}
    assert (written["dropped"], written["runs_cut"]) == ({"empty": 0}, 0)


def test_workers_and_chunks_change_nothing(rows, tmp_path, monkeypatch):
    first = prepare(job(rows, tmp_path / "one"))
    monkeypatch.setattr(pipeline, "CHUNK_DOCUMENTS", 7)
    again = prepare(job(rows, tmp_path / "two", workers=2))
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    assert first.identity == again.identity and again.provenance.workers == 2


def test_the_same_rows_as_parquet_give_the_same_shards(rows, tmp_path):
    table = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": DOCUMENTS, "n": range(len(DOCUMENTS))}), table)
    a = prepare(job(rows, tmp_path / "a"))
    b = prepare(job(table, tmp_path / "b", source="parquet", text_column="body"))
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    assert a.content.source.revision == b.content.source.revision


def test_the_split_of_a_document_does_not_depend_on_the_others(rows, tmp_path):
    prepare(job(rows, tmp_path / "whole", shard_tokens=10**6))
    part = write_rows(tmp_path / "part.jsonl", DOCUMENTS[::-2])
    prepare(job(part, tmp_path / "part", shard_tokens=10**6))

    def documents(folder):
        tokens = ",".join(map(str, read_shard(tmp_path / folder / "val_000000.bin")))
        return set(tokens.split("50256,")[1:])

    strip = {document.strip(",") for document in documents("part")}
    assert strip and strip < {document.strip(",") for document in documents("whole")}


def test_empty_documents_and_cut_runs_are_counted(tmp_path):
    documents = ["", *DOCUMENTS, " \n\t", "x" * 200_000]
    content = prepare(job(write_rows(tmp_path / "rows.jsonl", documents), tmp_path / "out")).content
    assert content.dropped.empty == 2 and content.runs_cut == 3
    assert sum(counts.documents for counts in content.splits.values()) == len(DOCUMENTS) + 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_leaves_nothing_behind(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK_DOCUMENTS", 7)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS) + "{\n")
    before = []
    with pytest.raises(UserError, match=r"bad.jsonl:123: not JSON"):
        prepare(job(bad, tmp_path / "out", workers=workers), report=lambda *_: before.append(len(shards(tmp_path))))
    assert max(before) > 1 and not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="not JSON"):
        prepare(job(bad, tmp_path / "there"))
    assert list((tmp_path / "there").iterdir()) == []


def shards(tmp_path):
    return list((tmp_path / "out").glob("*.bin"))


def test_a_full_disk_leaves_nothing_behind(rows, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(UserError, match="out: No space left on device"):
        prepare(job(rows, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_killed_job_leaves_no_data_set(rows, tmp_path):
    code = (
        "import os, signal\n"
        "from data_prep.writer import ShardWriter\n"
        "from data_prep.__main__ import main\n"
        "ShardWriter.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"main(['--source', 'jsonl', '--input', {str(rows)!r}, '--out', {str(tmp_path / 'out')!r}, '--workers', '1'])"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert shards(tmp_path)
    with pytest.raises(UserError, match="not a data set"):
        load_manifest(tmp_path / "out")
    with pytest.raises(UserError, match="--out .*not empty"):
        prepare(job(rows, tmp_path / "out"))


def test_nothing_is_overwritten(rows, tmp_path):
    done = job(rows, tmp_path / "out")
    prepare(done)
    before = shard_bytes(tmp_path / "out")
    with pytest.raises(UserError, match="--out .*already holds a data set"):
        prepare(dataclasses.replace(done, validation_fraction=0.3))
    assert shard_bytes(tmp_path / "out") == before
    with pytest.raises(UserError, match="rows.jsonl: is a file"):
        prepare(job(rows, rows))
    with pytest.raises(UserError, match="rows.jsonl/below: "):
        prepare(job(rows, rows / "below"))


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(shard_tokens=0), "--shard-tokens 0"),
        (dict(shard_tokens=2**31), "--shard-tokens 2147483648"),
        (dict(validation_fraction=0.0), "--validation-fraction 0.0: must be between"),
        (dict(validation_fraction=1.0), "--validation-fraction 1.0: must be between"),
        (dict(workers=0), "--workers 0"),
        (dict(validation_fraction=1e-9), "no document of 122 for the val split; use a larger"),
        (dict(validation_fraction=1 - 1e-9), "no document of 122 for the train split; use a smaller"),
        (dict(input=()), "--input"),
        (dict(text_column="body"), "no field 'body'"),
    ],
)
def test_mistakes_write_nothing(rows, tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        prepare(job(rows, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_no_document_with_text(tmp_path):
    with pytest.raises(UserError, match="rows.jsonl: no document with text in it"):
        prepare(job(write_rows(tmp_path / "rows.jsonl", ["", "\n"]), tmp_path / "out"))


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the command."""
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_the_command_makes_inspects_and_verifies(tmp_path, capsys):
    out = tmp_path / "docs"
    assert run(capsys, "--source", "python-docs", "--workers", 1, "--out", out)[0] == 0
    manifest = load_manifest(out)
    tokens = sum(counts.tokens for counts in manifest.content.splits.values())
    assert 400_000 < tokens < 1_500_000
    assert manifest.content.source.revision.endswith(".".join(map(str, sys.version_info[:3])))
    code, printed, _ = run(capsys, "inspect", out)
    assert code == 0
    assert json.JSONDecoder().raw_decode(printed)[0] == json.loads((out / "manifest.json").read_text())
    ids = read_shard(out / "train_000000.bin")
    first = ids[1 : ids.index(50256, 1)][:1000]
    assert printed.endswith(":\n" + gpt2_encoding().decode(first) + "\n")
    assert run(capsys, "verify", out)[0] == 0
    shard = out / "val_000000.bin"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, printed, error = run(capsys, "verify", out)
    assert (code, printed) == (1, "") and "val_000000.bin: damaged" in error and "train" not in error
    shard.write_bytes(data[:-2])
    code, _, error = run(capsys, "verify", out)
    assert code == 1 and "val_000000.bin: cut short" in error


def test_the_command_reports_mistakes_in_one_line(tmp_path, capsys):
    for arguments in (
        ["--source", "text", "--input", tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "out"],
        ["inspect", tmp_path / "out"],
        ["verify", tmp_path / "out"],
    ):
        code, printed, error = run(capsys, *arguments)
        assert (code, printed) == (2, "")
        assert error.startswith("error: ") and error.count("\n") == 1 and str(tmp_path) in error


def test_several_inputs_follow_one_option(tmp_path, capsys):
    for n in range(40):
        (tmp_path / f"{n:02d}.txt").write_text(f"Text number {n}.")
    files = sorted(tmp_path.glob("*.txt"))
    arguments = ["--source", "text", "--input", *files, "--validation-fraction", "0.3", "--out", tmp_path / "out"]
    code, printed, _ = run(capsys, *arguments)
    assert code == 0 and printed.splitlines()[-1].startswith(f"{tmp_path / 'out'}: ")
    assert load_manifest(tmp_path / "out").provenance.inputs == tuple(map(str, files))
