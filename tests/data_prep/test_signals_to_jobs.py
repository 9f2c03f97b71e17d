"""Signals to a job and to its workers: what is left is finished parts, and no process."""

import os
import signal
import time
from pathlib import Path

import pytest
from jobs import DOCUMENTS, command_of, job, records, shard_bytes, write_rows

from data_prep.pool import uninterrupted
from megaresid.data.manifest import MANIFEST_NAME


def alive(group: int) -> set[int]:
    """Processes of a group that have not ended."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of_group) == group and state != "Z":
            found.add(int(stat.parent.name))
    return found


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def long_job(tmp_path):
    """A job of many units that is under way with two workers, in another process."""
    documents = [f"{n} {text} " * 4 for n in range(200) for text in DOCUMENTS]
    started = job(write_rows(tmp_path / "rows.jsonl", documents), tmp_path / "out", shard_tokens=10**5, workers=2)
    process = command_of(started)
    wait_until(lambda: records(started.out) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    yield started, process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize(
    "send, sent, code, says",
    [
        # A terminal's Ctrl-C and a cluster's SIGTERM reach the workers too.
        (os.killpg, signal.SIGINT, 130, "interrupted"),
        pytest.param(os.killpg, signal.SIGTERM, 143, "terminated", marks=pytest.mark.full),
        pytest.param(os.kill, signal.SIGTERM, 143, "terminated", marks=pytest.mark.full),
    ],
    ids=["INT to all", "TERM to all", "TERM"],
)
def test_an_interrupted_command_leaves_its_parts_and_no_process(long_job, send, sent, code, says):
    started, process = long_job
    send(process.pid, sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and f"{says}; a job goes on with --resume" in error and "Traceback" not in error
    wait_until(lambda: not alive(process.pid))
    assert records(started.out) and not shard_bytes(started.out) and not (started.out / MANIFEST_NAME).exists()
    assert not list((started.out / "parts").glob("*.partial"))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_end_of_what_they_must_not_interrupt(sent):
    came = []
    before = signal.signal(sent, lambda number, _: came.append(number))
    try:
        with uninterrupted():
            signal.raise_signal(sent)
            assert came == []
        assert came == [sent]
        signal.raise_signal(sent)
        assert came == [sent, sent], "the handler is back"
    finally:
        signal.signal(sent, before)


def test_workers_end_with_a_parent_that_is_killed(long_job):
    started, process = long_job
    assert len(alive(process.pid)) > 2
    process.kill()
    wait_until(lambda: not alive(process.pid))
    assert records(started.out)


def test_a_killed_worker_stops_the_job_with_its_files_named(long_job):
    started, process = long_job
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [child for child in map(int, children) if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "a worker process was killed (out of memory?), at work were" in error
    assert started.input[0] in error and "--resume" in error and "Traceback" not in error
    wait_until(lambda: not alive(process.pid))
    assert records(started.out) and not shard_bytes(started.out)
