"""Interrupted jobs: whatever ends one, --resume gives the same bytes and makes only what was not finished."""

import dataclasses
import fcntl
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from jobs import DOCUMENTS, command_of, data_set, expected_shards, job, records, shard_bytes, small_units, write_rows

from data_prep import pipeline
from data_prep.pipeline import prepare
from data_prep.sources.source import Share
from data_prep.worker import Worker
from megaresid.data.manifest import MANIFEST_NAME, load_manifest
from megaresid.errors import UserError

CUT = dict(deduplicate=True, shard_tokens=150)


@pytest.fixture(autouse=True)
def units(monkeypatch):
    small_units(monkeypatch)


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", DOCUMENTS + DOCUMENTS[:40])


@pytest.fixture
def whole(rows, tmp_path):
    """What an undisturbed job makes."""
    prepare(job(rows, tmp_path / "whole", **CUT))
    assert shard_bytes(tmp_path / "whole") == expected_shards(DOCUMENTS, shard_tokens=150)
    return data_set(tmp_path / "whole")


def in_child(work) -> int:
    """Run ``work`` in a copy of this process; its exit status as os.waitpid gives it."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(event: int, started: job) -> bool:
    """Do the job in a process that kills itself when it is about to touch a file of the job for the ``event``th time.
    False where it did not come to that."""

    def work():
        left = event

        def kill_at_event(name, arguments):
            nonlocal left
            if name.split(".")[0] in ("open", "os", "shutil") and str(started.out) in str(arguments[:2]):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill_at_event)
        prepare(started)

    status = in_child(work)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def check_killed_and_resumed(rows, tmp_path, event, whole, monkeypatch) -> bool:
    started = job(rows, tmp_path / f"out{event}", **CUT)
    if not killed_at(event, started):
        return False
    out, made, kept = started.out, set(), {}
    before = records(out) if out.exists() else {}
    make_part, remove = Worker.make_part, pipeline.remove_parts

    def seen_made(worker, unit, report):
        made.add(f"{unit.name}.json")
        return make_part(worker, unit, report)

    def seen_removed(parts):
        kept.update(records(out))
        remove(parts)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "make_part", seen_made)
        patch.setattr(pipeline, "remove_parts", seen_removed)
        prepare(dataclasses.replace(started, resume=True))
    assert data_set(out) == whole
    assert not made & set(before), "a finished part was made again"
    assert before.items() <= kept.items()
    shutil.rmtree(out)
    return True


def test_killed_at_random_points_and_resumed(rows, tmp_path, whole, monkeypatch):
    """The points are the job's accesses to its own files: while a part is made, between its files, while shards are
    cut, around the manifest, while the parts are removed."""
    chance = random.Random(5)
    survived = 0
    for event in sorted(chance.sample(range(120), 8)):
        survived += not check_killed_and_resumed(rows, tmp_path, event, whole, monkeypatch)
    assert survived < 3


@pytest.mark.full
def test_killed_at_every_point_and_resumed(rows, tmp_path, whole, monkeypatch):
    event = 0
    while check_killed_and_resumed(rows, tmp_path, event, whole, monkeypatch):
        event += 1
    assert event > 60


@pytest.mark.full
def test_killed_again_and_again_at_random_times_with_workers(tmp_path):
    documents = [f"{n} {text}" for n in range(60) for text in DOCUMENTS]
    rows, chance = write_rows(tmp_path / "rows.jsonl", documents), random.Random(7)
    prepare(job(rows, tmp_path / "whole", shard_tokens=10**4))
    started = job(rows, tmp_path / "out", shard_tokens=10**4, workers=2)
    kept, kills = {}, 0
    while not (started.out / MANIFEST_NAME).exists():
        process = command_of(started, *["--resume"] * (kills > 0))
        try:
            process.wait(chance.uniform(1.0, 4.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            now = records(started.out) if started.out.exists() else {}
            if (started.out / MANIFEST_NAME).exists():
                prepare(dataclasses.replace(started, resume=True))
            else:
                assert kept.items() <= now.items(), "a finished part was made again"
                kept = now
    assert kills and data_set(tmp_path / "out") == data_set(tmp_path / "whole")


def unfinished(rows, out, parts=2, **options):
    """A job that stops with an error after some parts; the job."""
    started = job(rows, out, **options)

    class Trouble(Exception):
        pass

    make_part, made = Worker.make_part, []

    def make_some(worker, unit, report):
        if len(made) == parts:
            raise Trouble
        made.append(unit)
        return make_part(worker, unit, report)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Trouble):
        patch.setattr(Worker, "make_part", make_some)
        prepare(started)
    assert len(records(out)) == parts and not shard_bytes(out) and not (out / MANIFEST_NAME).exists()
    return started


def test_an_error_before_the_first_part_leaves_nothing(rows, tmp_path):
    (tmp_path / "made").mkdir()
    started = job(rows, tmp_path / "made" / "out" / "below")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Worker, "make_part", lambda *_: 1 / 0)
        prepare(started)
    assert list((tmp_path / "made").iterdir()) == []


def test_workers_and_backend_may_change_between_runs(rows, tmp_path, whole):
    started = unfinished(rows, tmp_path / "out", **CUT, tokenizer_backend="tiktoken")
    prepare(dataclasses.replace(started, resume=True, workers=2, tokenizer_backend="auto", skip_unreadable=True))
    assert data_set(tmp_path / "out") == whole


def test_what_could_not_be_read_is_tried_again(tmp_path):
    """A passing fault of a disk leaves no gap behind."""
    texts = [tmp_path / "in" / f"{n}.jsonl.gz" for n in range(4)]
    texts[0].parent.mkdir()
    for n, path in enumerate(texts):
        rows = "".join(json.dumps({"text": f"{n} {i} {'and so on ' * 9}"}) + "\n" for i in range(60))
        path.write_bytes(gzip.compress(rows.encode(), 0))
    whole = prepare(job(tmp_path / "in", tmp_path / "whole"))
    good, times = texts[1].read_bytes(), texts[1].stat()

    def write(data):
        texts[1].write_bytes(data)
        os.utime(texts[1], ns=(times.st_atime_ns, times.st_mtime_ns))

    write(good[:-40] + bytes(40))
    started = unfinished(tmp_path / "in", tmp_path / "out", parts=3, skip_unreadable=True)
    write(good)
    assert prepare(dataclasses.replace(started, resume=True, skip_unreadable=False)).content == whole.content


def test_a_data_set_is_not_taken_for_that_of_another_job(rows, tmp_path):
    """Where nothing but an empty folder is left of a job that was killed at its end, there is no plan to compare."""
    started = job(rows, tmp_path / "out")
    made = prepare(started)
    for change in (dict(validation_fraction=0.5), dict(deduplicate=True), dict(source="parquet"), {}):
        (tmp_path / "out" / "parts").mkdir(exist_ok=True)
        again = dataclasses.replace(started, resume=True, **change)
        if change:
            with pytest.raises(UserError):
                prepare(again)
        else:
            assert prepare(again) == made
    assert not (tmp_path / "out" / "parts").exists()


def test_a_file_that_changes_while_it_is_read_gives_no_data_set(rows, tmp_path, monkeypatch):
    make_part = Worker.make_part

    def touching(worker, unit, report):
        os.utime(rows)
        return make_part(worker, unit, report)

    monkeypatch.setattr(Worker, "make_part", touching)
    for options in ({}, dict(partition=Share(1, 2))):
        out = tmp_path / f"out{len(options)}"
        with pytest.raises(UserError, match="changed while the job read it"):
            prepare(job(rows, out, **options))
        assert not (out / MANIFEST_NAME).exists() and not (out / "parts" / "share.json").exists()


def test_resume_of_nothing_begins(rows, tmp_path, whole):
    prepare(job(rows, tmp_path / "out", resume=True, **CUT))
    assert data_set(tmp_path / "out") == whole


def test_a_share_is_resumed(rows, tmp_path):
    share = dict(partition=Share(2, 2))
    prepare(job(rows, tmp_path / "whole", **share))
    started = unfinished(rows, tmp_path / "out", **share)
    before = records(tmp_path / "out")
    for _ in range(2):
        prepare(dataclasses.replace(started, resume=True))
        names = [path.name for path in (tmp_path / "whole" / "parts").iterdir()]
        assert {name: (tmp_path / "out" / "parts" / name).read_bytes() for name in names if name != "lock"} == {
            name: (tmp_path / "whole" / "parts" / name).read_bytes() for name in names if name != "lock"
        }
    assert before.items() < records(tmp_path / "out").items()


def test_an_unfinished_job_is_not_begun_anew(rows, tmp_path):
    started = unfinished(rows, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(UserError, match="--out .*out: holds an unfinished job; go on with it by --resume"):
        prepare(started)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(UserError, match="not a data set"):
        load_manifest(tmp_path / "out")


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(shard_tokens=101), "--shard-tokens 101: the unfinished job in .* had 100;"),
        (dict(validation_fraction=0.3), "--validation-fraction 0.3: the unfinished job in .* had 0.2"),
        (dict(limit_tokens=7), "--limit-tokens 7: the unfinished job in .* had none"),
        (dict(deduplicate=True), "--deduplicate True: the unfinished job in .* had False"),
        (dict(language="en"), "--language en: the unfinished job in .* had none"),
        (dict(text_column="body"), "--text-column body: the unfinished job in .* had text"),
        (dict(source="text"), "--source text: the unfinished job in .* had jsonl"),
        (dict(partition=Share(1, 2)), "--partition 1/2: the unfinished job in .* had 1/1"),
    ],
)
def test_other_options_are_refused(rows, tmp_path, options, says):
    started = unfinished(rows, tmp_path / "out")
    before = records(tmp_path / "out")
    with pytest.raises(UserError, match=says):
        prepare(dataclasses.replace(started, resume=True, **options))
    assert records(tmp_path / "out") == before


def test_a_changed_source_is_refused(tmp_path):
    files = [write_rows(tmp_path / f"{n}.jsonl", DOCUMENTS) for n in range(3)]
    started = unfinished(tmp_path / "*.jsonl", tmp_path / "out")
    again = dataclasses.replace(started, resume=True)
    stat = files[1].stat()
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"--resume: .*/1.jsonl was written again after"):
        prepare(again)
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    text = files[1].read_text()
    files[1].write_text(text + text)
    with pytest.raises(UserError, match=rf"/1.jsonl has {2 * len(text.encode())} bytes, and had {len(text.encode())}"):
        prepare(again)
    files[1].rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"/1.jsonl was read by the unfinished job and is missing now"):
        prepare(again)
    (tmp_path / "moved").rename(files[1])
    files[1].write_text(text)
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    write_rows(tmp_path / "3.jsonl", DOCUMENTS)
    with pytest.raises(UserError, match=r"/3.jsonl was not there when the unfinished job began"):
        prepare(again)
    (tmp_path / "3.jsonl").unlink()
    with pytest.raises(UserError, match="another order"):
        prepare(dataclasses.replace(again, input=tuple(map(str, files[::-1]))))
    prepare(again)
    assert shard_bytes(tmp_path / "out") == expected_shards(DOCUMENTS * 3)


def test_parts_of_another_version_are_refused(rows, tmp_path):
    started = unfinished(rows, tmp_path / "out")
    plan = tmp_path / "out" / "parts" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"format": 0}))
    with pytest.raises(UserError, match="--resume: another version of data_prep began the job in "):
        prepare(dataclasses.replace(started, resume=True))
    plan.write_text("{")
    with pytest.raises(UserError, match="plan.json: .*"):
        prepare(dataclasses.replace(started, resume=True))


def test_two_jobs_on_one_folder(rows, tmp_path):
    started = unfinished(rows, tmp_path / "out")
    with open(tmp_path / "out" / "parts" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for resume in (False, True):
            with pytest.raises(UserError, match="--out .*out: another process is at work on it"):
                prepare(dataclasses.replace(started, resume=resume))
    second = []

    def report(*_):
        if not second:
            with pytest.raises(UserError, match="another process is at work on it") as caught:
                prepare(dataclasses.replace(started, resume=True))
            second.append(caught)

    prepare(dataclasses.replace(started, resume=True), report)
    assert second and shard_bytes(tmp_path / "out") == expected_shards(DOCUMENTS + DOCUMENTS[:40])


def test_a_damaged_part_is_found_and_made_again_when_deleted(rows, tmp_path, whole):
    started = unfinished(rows, tmp_path / "out", **CUT)
    ids = tmp_path / "out" / "parts" / "000000-000001.ids"
    data = bytearray(ids.read_bytes())
    data[10] ^= 1
    ids.write_bytes(data)
    again = dataclasses.replace(started, resume=True)
    with pytest.raises(UserError, match="000000-000001.ids: damaged; delete 000000-000001.json beside it"):
        prepare(again)
    ids.with_suffix(".json").unlink()
    prepare(again)
    assert data_set(tmp_path / "out") == whole
