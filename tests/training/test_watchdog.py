"""A rank that hangs is named, and the run ends: processes that only count beats, since what hangs may be anything."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from megaresid.training.supervisor import Report
from megaresid.training.watchdog import Watchdog, to_blame

PATIENCE = 1.0
RANK = """
import sys, time
from pathlib import Path
from megaresid.training.supervisor import Report
from megaresid.training.watchdog import Watchdog
import stuck

rank, run, how = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]


class Engine:
    def set_step(self, step):
        pass

    def train_step(self, batches):
        next(batches)
        print("step", flush=True)

    def loss(self):
        pass

    score = loss


def batches():
    while True:
        if how == "reads" and rank == 1 and steps == 3:
            stuck.reads()
        yield None


def evaluates():
    if how == "evaluates" and rank == 1:
        stuck.evaluates()
    stuck.collective()


print("ready", flush=True)
sys.stdin.readline()
steps = 0
with Watchdog(run, rank, 2, PATIENCE, Report()) as watchdog:
    engine = Engine()
    watchdog.follow(engine)
    source = watchdog.each(batches())
    while how != "first" and steps < 5:
        engine.set_step(steps + 1)
        engine.train_step(source)
        steps += 1
    if how == "slow":
        for _ in range(30):
            engine.loss()
            time.sleep(PATIENCE / 10)
        print("done", flush=True)
    elif how != "done":
        evaluates()
""".replace("PATIENCE", str(PATIENCE))
STUCK = """
import collective_of_torch


def reads():
    while True:
        pass


def evaluates():
    while True:
        pass


def collective():
    collective_of_torch.wait()
"""


@pytest.fixture
def start(tmp_path):
    """``start(how)``: two ranks; their errors, and the seconds until the last of them ended."""
    # Known by its folder; the true one takes seconds to import.
    collective = tmp_path / "packages/torch/distributed/collective_of_torch.py"
    collective.parent.mkdir(parents=True)
    collective.write_text("import threading\n\n\ndef wait():\n    threading.Event().wait()\n")
    (tmp_path / "packages/stuck.py").write_text(STUCK)
    (tmp_path / "rank.py").write_text(RANK)
    run = tmp_path / "run"
    run.mkdir()
    started = []

    def run_ranks(how, stop=None):
        command = [sys.executable, tmp_path / "rank.py"]
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}/packages:{collective.parent}"}
        for rank in range(2):
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            started.append(subprocess.Popen([*command, str(rank), run, how], env=environment, text=True, **pipes))
        for rank in started:
            assert rank.stdout.readline() == "ready\n"
        for rank in started:
            rank.stdin.write("go\n")
            rank.stdin.flush()
        if stop is not None:
            for rank in started:
                for _ in range(5):
                    assert rank.stdout.readline() == "step\n"
            started[stop].send_signal(signal.SIGSTOP)
        since = time.monotonic()
        codes, errors = {}, ""
        for rank, process in enumerate(started):
            if rank != stop:
                _, said = process.communicate(timeout=60)
                errors += said
                codes[rank] = process.returncode
        return codes, errors, time.monotonic() - since

    yield run_ranks
    for process in started:
        process.kill()
        process.communicate()


def test_a_rank_whose_batch_never_comes_is_named_with_its_place(start, tmp_path):
    codes, errors, seconds = start("reads")
    assert codes == {0: 1, 1: 1} and seconds < 10 * PATIENCE
    [line] = errors.splitlines()
    assert re.search(r"error: rank 1 has not come, and the others have waited for it for 1 s: process \d+ on \S+", line)
    assert re.search(rf"training at step 4, in {re.escape(str(tmp_path))}/packages/stuck.py, line \d+;", line)


def test_a_rank_in_an_endless_loop_of_an_evaluation_is_named(start):
    """Both have counted as much; one is in a collective."""
    codes, errors, _ = start("evaluates")
    assert codes == {0: 1, 1: 1}
    assert re.search(r"error: rank 1 has not come.* at step 5, in .*stuck.py, line", errors)
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_whose_process_is_stopped_is_named_by_one_that_waits(start, stopped):
    codes, errors, _ = start("waits", stop=stopped)
    assert codes == {1 - stopped: 1}
    assert re.search(rf"error: rank {stopped} has stopped", errors) and len(errors.splitlines()) == 1


def test_where_all_wait_alike_every_ranks_place_is_told(start):
    codes, errors, _ = start("waits")
    first, *places = errors.splitlines()
    assert codes == {0: 1, 1: 1} and first.startswith("error: no rank has made progress for 1 s")
    assert [place.split(" process ")[0] for place in places] == ["  rank 0", "  rank 1"]


@pytest.mark.full
def test_the_first_step_has_four_times_as_long(start):
    _, errors, seconds = start("first")
    assert "no rank has made progress for 4 s" in errors and seconds > 4 * PATIENCE


@pytest.mark.full
def test_an_evaluation_of_many_forwards_is_progress(start):
    """Of three times the patience."""
    codes, errors, seconds = start("slow")
    assert (codes, errors) == ({0: 0, 1: 0}, "") and seconds > 2 * PATIENCE


def test_ranks_that_end_leave_no_file(start, tmp_path):
    codes, errors, _ = start("done")
    assert (codes, errors) == ({0: 0, 1: 0}, "") and list((tmp_path / "run").iterdir()) == []


def test_without_patience_nothing_is_written_and_no_thread_started(tmp_path):
    with Watchdog(tmp_path, 0, 1, 0.0, Report()) as watchdog:
        watchdog.beat("training")
        assert list(tmp_path.iterdir()) == []


def found(*ranks):
    return {
        rank: {"rank": rank, "pulse": pulse, "beats": beats, "in_collective": waits}
        for rank, (pulse, beats, waits) in enumerate(ranks)
    }


@pytest.mark.parametrize(
    "before, after, blamed",
    [
        ([(1, 9, True), (1, 9, True)], [(2, 9, True), (2, 9, True)], {}),
        ([(1, 9, True), (1, 9, True)], [(2, 9, True), (1, 9, True)], {1: "has stopped"}),
        # A stopped rank is to blame even where it has counted most: it ran ahead of who waits for it.
        ([(1, 8, True), (1, 9, False)], [(2, 8, True), (1, 9, False)], {1: "has stopped"}),
        (
            [(1, 9, True), (1, 8, True), (1, 7, False)],
            [(2, 9, True), (2, 8, True), (2, 7, True)],
            {1: "has not come", 2: "has not come"},
        ),
        ([(1, 9, False), (1, 9, True)], [(2, 9, False), (2, 9, True)], {0: "has not come"}),
        ([(1, 9, False), (1, 9, False)], [(2, 9, False), (2, 9, False)], {}),
        ([(1, 9, True), (None, -1, False)], [(2, 9, True), (None, -1, False)], {1: "has stopped"}),
    ],
)
def test_who_is_to_blame(before, after, blamed):
    assert to_blame(found(*before), found(*after)) == blamed
