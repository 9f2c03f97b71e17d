"""What a job makes, against the definition, however the work is shared out."""

import dataclasses
import hashlib
import json
import multiprocessing
import threading
from collections import Counter

import pyarrow
import pytest
from jobs import (
    DOCUMENTS,
    data_set,
    expected_shards,
    expected_tokens,
    gpt2,
    job,
    read_shard,
    shard_bytes,
    small_units,
    write_rows,
)
from pyarrow import parquet

from data_prep import pipeline, schedule, writer
from data_prep.merge import merge
from data_prep.pipeline import prepare
from data_prep.sources.source import Share
from megaresid.data.manifest import load_manifest
from megaresid.errors import UserError


@pytest.fixture(autouse=True)
def units(monkeypatch):
    small_units(monkeypatch)


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", DOCUMENTS)


def test_shards_and_manifest_by_definition(rows, tmp_path):
    out = tmp_path / "made" / "out"
    manifest = prepare(job(rows, out))
    assert load_manifest(out) == manifest
    shards, written = data_set(out)
    assert shards == expected_shards(DOCUMENTS) and len(shards) > 10
    for name, data in shards.items():
        ids = read_shard(out / name)
        assert {
            "name": name,
            "split": name.split("_")[0],
            "tokens": len(ids),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "largest_id": max(ids),
        } in written["shards"]
    for split, tokens in expected_tokens(DOCUMENTS, 0.2).items():
        assert written["splits"][split] == {"documents": tokens.count(50256), "tokens": len(tokens)}
    digests = b"".join(hashlib.sha256(text.encode()).digest() for text in DOCUMENTS)
    assert written["source"] == {"kind": "jsonl", "revision": f"sha256:{hashlib.sha256(digests).hexdigest()}"}
    assert written["options"] == {"shard_tokens": 100, "validation_fraction": 0.2}
    assert (written["dropped"], written["runs_cut"]) == ({"empty": 0}, 0) and "limited" not in written
    provenance = manifest.provenance
    line = f"{rows} {rows.stat().st_size} {rows.stat().st_mtime_ns}\n"
    assert provenance.source_files.model_dump() == {
        "count": 1,
        "bytes": rows.stat().st_size,
        "sha256": hashlib.sha256(line.encode()).hexdigest(),
    }
    assert (provenance.inputs, provenance.text_column, provenance.workers) == ((str(rows),), "text", 1)


@pytest.mark.parametrize(
    "workers, backend",
    [(1, "auto"), (2, "auto"), pytest.param(3, "tiktoken", marks=pytest.mark.full)],
)
def test_workers_and_backends_change_nothing(rows, tmp_path, workers, backend):
    # Other tests of this process may have processes of theirs.
    made_by, reports, threads, children = set(), [], threading.active_count(), set(multiprocessing.active_children())
    before = pipeline.Pool
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Pool", lambda *args: made_by.add(args[0]) or before(*args))
        # One worker of a large source is a process too.
        patch.setattr(pipeline, "WORTH_A_PROCESS", 0)
        many = job(rows, tmp_path / "many", workers=workers, tokenizer_backend=backend)
        manifest = prepare(many, lambda *report: reports.append(report))
    assert made_by == {workers} and manifest.provenance.workers == workers
    assert set(multiprocessing.active_children()) == children and threading.active_count() == threads
    check_reports(reports)
    prepare(job(rows, tmp_path / "one"))
    assert data_set(tmp_path / "many") == data_set(tmp_path / "one")
    assert shard_bytes(tmp_path / "one") == expected_shards(DOCUMENTS)


@pytest.mark.full
def test_sixteen_workers_and_large_units_change_nothing(tmp_path):
    documents = [text * 50 for text in DOCUMENTS * 8]
    rows = write_rows(tmp_path / "rows.jsonl", documents)
    made = [prepare(job(rows, tmp_path / f"{n}", workers=n, shard_tokens=10**5)) for n in (1, 16)]
    assert data_set(tmp_path / "1") == data_set(tmp_path / "16")
    assert shard_bytes(tmp_path / "1") == expected_shards(documents, shard_tokens=10**5)
    assert made[0].identity == made[1].identity


@pytest.mark.parametrize("options", [{}, {"deduplicate": True, "limit_tokens": 1500}], ids=["plain", "cut"])
def test_partitions_joined_are_the_same(tmp_path, options):
    documents = DOCUMENTS + DOCUMENTS[::3]
    rows = write_rows(tmp_path / "rows.jsonl", documents)
    shares = [tmp_path / f"share{number}" for number in (1, 2, 3)]
    for number, out in enumerate(shares, 1):
        assert prepare(job(rows, out, partition=Share(number, 3), **options)) is None
        assert shard_bytes(out) == {} and not (out / "manifest.json").exists()
        share = json.loads((out / "parts" / "share.json").read_text())
        assert len(share["parts"]) > 1 and (share["number"], share["of"], share["complete"]) == (number, 3, True)
    merge(shares[::-1], tmp_path / "joined")
    prepare(job(rows, tmp_path / "whole", **options))
    assert data_set(tmp_path / "joined") == data_set(tmp_path / "whole")
    if not options:
        assert shard_bytes(tmp_path / "joined") == expected_shards(documents)


def test_a_limit_takes_documents_in_order_while_they_fit(rows, tmp_path):
    kept, tokens = [], 0
    lengths = [1 + len(gpt2().encode_ordinary(text)) for text in DOCUMENTS]
    limit = sum(lengths[:50]) + lengths[50] - 1
    for text, length in zip(DOCUMENTS, lengths, strict=True):
        if tokens + length > limit:
            break
        kept.append(text)
        tokens += length
    for workers in (1, 2):
        out = tmp_path / str(workers)
        manifest = prepare(job(rows, out, limit_tokens=limit, workers=workers))
        assert shard_bytes(out) == expected_shards(kept) and len(kept) == 50
        assert manifest.content.limited and manifest.content.options.limit_tokens == limit
        digests = b"".join(hashlib.sha256(text.encode()).digest() for text in kept)
        assert manifest.content.source.revision == f"sha256:{hashlib.sha256(digests).hexdigest()}"


def test_a_limit_leaves_later_units_alone(rows, tmp_path, monkeypatch):
    """Neither made, nor a reason to fail: what comes after the end is not looked at."""
    made = count_parts(monkeypatch)
    limit = sum(1 + len(gpt2().encode_ordinary(text)) for text in DOCUMENTS[:10])
    prepare(job(rows, tmp_path / "out", limit_tokens=limit))
    assert made == Counter({"000000-000000": 1})


def count_parts(monkeypatch) -> Counter:
    """How often each part was made in this process."""
    made, make_part = Counter(), schedule.Worker.make_part

    def counted(worker, unit, report):
        made[unit.name] += 1
        return make_part(worker, unit, report)

    monkeypatch.setattr(schedule.Worker, "make_part", counted)
    return made


def test_duplicates_are_left_out_and_counted(tmp_path):
    documents = [text for text in DOCUMENTS for _ in range(2)] + DOCUMENTS[:30]
    manifest = prepare(job(write_rows(tmp_path / "rows.jsonl", documents), tmp_path / "out", deduplicate=True))
    assert shard_bytes(tmp_path / "out") == expected_shards(DOCUMENTS)
    assert manifest.content.dropped.duplicates == len(documents) - len(DOCUMENTS)
    assert manifest.content.options.deduplicate is True
    data_set(tmp_path / "out")


def test_the_same_rows_as_parquet_give_the_same_shards(rows, tmp_path):
    table = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": DOCUMENTS, "n": range(len(DOCUMENTS))}), table)
    a = prepare(job(rows, tmp_path / "a"))
    b = prepare(job(table, tmp_path / "b", source="parquet", text_column="body"))
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    assert a.content.source.revision == b.content.source.revision


def test_filters_decide_which_documents_there_are(tmp_path):
    languages, scores = ["en", "de", "fr"] * 41, [n % 10 / 10 for n in range(123)]
    columns = {"text": DOCUMENTS + ["one more"], "language": languages, "language_score": scores}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    filters = dict(language="en", minimum_language_score=0.3)
    manifest = prepare(job(tmp_path / "rows.parquet", tmp_path / "out", source="parquet", **filters))
    rows = list(zip(*columns.values(), strict=True))
    kept = [text for text, language, score in rows if language == "en" and score >= 0.3]
    assert shard_bytes(tmp_path / "out") == expected_shards(kept)
    dropped = manifest.content.dropped
    assert dropped.other_language == sum(language != "en" for language in languages)
    assert dropped.low_score == sum(language == "en" and score < 0.3 for _, language, score in rows)
    assert manifest.content.options.model_dump(exclude_none=True) == {
        "shard_tokens": 100,
        "validation_fraction": 0.2,
        "language": "en",
        "minimum_language_score": 0.3,
    }


def test_the_split_of_a_document_does_not_depend_on_the_others(rows, tmp_path):
    prepare(job(rows, tmp_path / "whole", shard_tokens=10**6))
    part = write_rows(tmp_path / "part.jsonl", DOCUMENTS[::-2])
    prepare(job(part, tmp_path / "part", shard_tokens=10**6))

    def documents(folder):
        tokens = ",".join(map(str, read_shard(tmp_path / folder / "val_000000.bin")))
        return set(tokens.split("50256,")[1:])

    strip = {document.strip(",") for document in documents("part")}
    assert strip and strip < {document.strip(",") for document in documents("whole")}


def test_what_is_left_out_is_counted(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ["", *DOCUMENTS, " \n\t", "x" * 70_000])
    with open(rows, "ab") as file:
        file.write(b'{"text": 3}\n{\n{"text": "\xff"}\n')
    content = prepare(job(rows, tmp_path / "out")).content
    assert content.dropped.model_dump(exclude_none=True) == {"empty": 2, "bad_rows": 2, "invalid_utf8": 1}
    assert content.runs_cut == 1
    assert sum(counts.documents for counts in content.splits.values()) == len(DOCUMENTS) + 1


def test_a_full_disk_keeps_the_parts(rows, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "fsync", full)
        with pytest.raises(UserError, match="out.*: No space left on device"):
            prepare(job(rows, tmp_path / "out"))
    assert not (tmp_path / "out").exists(), "os.fsync is of no use to parts either: nothing was finished"
    with monkeypatch.context() as patch:
        append, calls = writer.ShardWriter.append, []

        def append_six_times(self, ids):
            calls.append(len(ids))
            full() if len(calls) > 6 else append(self, ids)

        patch.setattr(writer.ShardWriter, "append", append_six_times)
        with pytest.raises(UserError, match="No space left on device.*--resume"):
            prepare(job(rows, tmp_path / "out"))
    assert shard_bytes(tmp_path / "out") == {} and list((tmp_path / "out" / "parts").glob("0*.json"))
    prepare(job(rows, tmp_path / "out", resume=True))
    assert shard_bytes(tmp_path / "out") == expected_shards(DOCUMENTS)


def test_nothing_is_overwritten(rows, tmp_path):
    done = job(rows, tmp_path / "out")
    prepare(done)
    before = shard_bytes(tmp_path / "out")
    for again in (done, dataclasses.replace(done, validation_fraction=0.3), dataclasses.replace(done, resume=True)):
        with pytest.raises(UserError, match="--out .*already holds a data set"):
            prepare(again)
    assert shard_bytes(tmp_path / "out") == before
    with pytest.raises(UserError, match="rows.jsonl: is a file"):
        prepare(job(rows, rows))
    with pytest.raises(UserError, match="rows.jsonl/below: "):
        prepare(job(rows, rows / "below"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    for resume in (False, True):
        with pytest.raises(UserError, match="--out .*full: not empty"):
            prepare(job(rows, tmp_path / "full", resume=resume))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(shard_tokens=0), "--shard-tokens 0"),
        (dict(shard_tokens=2**31), "--shard-tokens 2147483648"),
        (dict(validation_fraction=0.0), "--validation-fraction 0.0: must be between"),
        (dict(validation_fraction=1.0), "--validation-fraction 1.0: must be between"),
        (dict(workers=0), "--workers 0"),
        (dict(limit_tokens=0), "--limit-tokens 0"),
        (dict(minimum_score=float("nan")), "--minimum-score nan"),
        (dict(minimum_language_score=float("inf")), "--minimum-language-score inf"),
        (dict(validation_fraction=1e-9), "no document of 122 for the val split; use a larger"),
        (dict(validation_fraction=1 - 1e-9), "no document of 122 for the train split; use a smaller"),
        (dict(limit_tokens=5), "--limit-tokens 5: the first document of .*rows.jsonl has more"),
        (dict(dataset="a/b"), "--dataset a/b: of no use with --source jsonl"),
        (dict(revision="v2"), "--revision v2: of no use"),
        (dict(source="text", language="en"), "--language en: of no use with --source text"),
        (dict(source="python-docs", input=(), text_column="body"), "--text-column body: of no use"),
        (dict(input=()), "--input"),
        (dict(text_column="body"), "body"),
    ],
)
def test_mistakes_write_nothing(rows, tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        prepare(job(rows, tmp_path / "made" / "out", **options))
    assert not (tmp_path / "made").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=says):
        prepare(job(rows, tmp_path / "there", **options))
    assert list((tmp_path / "there").iterdir()) == []


def test_no_document_with_text(tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl: no document to keep in it \(left out: 2 empty\)"):
        prepare(job(write_rows(tmp_path / "rows.jsonl", ["", "\n"]), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_reports_rise_to_the_end(rows, tmp_path):
    reports = []
    prepare(job(rows, tmp_path / "out"), lambda *report: reports.append(report))
    check_reports(reports)
    assert reports == sorted(reports)


def check_reports(reports):
    tokens = sum(map(len, expected_tokens(DOCUMENTS, 0.2).values()))
    assert reports[0] == (0.0, 0, 0) and reports[-1] == (1.0, len(DOCUMENTS), tokens)
    assert all(0 <= fraction <= 1 for fraction, _, _ in reports)
    assert any(0 < fraction < 1 and 0 < documents < len(DOCUMENTS) for fraction, documents, _ in reports)
