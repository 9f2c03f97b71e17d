"""Signals to launch/train.sh in real runs: what is saved, the code, and that no process is left."""

import os
import re
import signal

import pytest
from supervised_runs import Started, launcher, living, make_workplace, ranks_of, training

from megaresid.errors import UserError
from megaresid.training.checkpoint import find_checkpoint
from megaresid.training.run_dir import RunDirectory


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("signals"))


def start(root, name, run):
    return Started("bash", root / "launch/train.sh", *launcher(name), *training(root, run))


def stops(started, root, run, number):
    """Send a signal and hold the run to what is promised: one step more at the most, saved, nothing left."""
    made = int(started.until(r"^step (\d+)/")[1])
    started.signal(number)
    assert started.code() == 75
    said = started.said()
    after = said[said.index(f"{number.name}: the ranks save") :]
    assert len(re.findall(r"^step ", after, re.MULTILINE)) <= 2, "that which was being made, and one that was printed"
    stopped = int(re.search(r"stopped by a signal at step (\d+), which is saved", said)[1])
    assert stopped >= made
    assert find_checkpoint(root / run).name == f"step_{stopped:08d}"
    assert "Traceback" not in said and "ERROR" not in said and living(root / run) == []


def test_a_run_under_deepspeeds_launcher(root):
    """One run for all: its start is what costs."""
    with start(root, "deepspeed", "run") as started:
        started.until("^step 2/")
        assert sorted(ranks_of(root / "run")) == [0, 1]
        with pytest.raises(UserError, match="is in use by another process"):
            RunDirectory(root / "run")
        assert find_checkpoint(root / "run") is None
        started.signal(signal.SIGUSR1)
        while find_checkpoint(root / "run") is None:
            started.until("^step ")
        started.until("^step ")
        started.until("^step ")
        assert len(list((root / "run/checkpoints").glob("step_*"))) == 1, "saved once, and went on"
        stops(started, root, "run", signal.SIGTERM)
    assert len(list((root / "run/checkpoints").glob("step_*"))) == 2
    assert not (root / "run/.heartbeats").exists()


@pytest.mark.full
@pytest.mark.parametrize("name, number", [("torchrun", signal.SIGINT), ("python", signal.SIGTERM)])
def test_a_run_that_is_started_otherwise(root, name, number):
    with start(root, name, name) as started:
        started.until("^step 2/")
        stops(started, root, name, number)


@pytest.mark.full
@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_a_second_signal_ends_ranks_that_do_not_answer(root, name):
    run = f"{name} killed"
    with start(root, name, run) as started:
        started.until("^step 2/")
        for pid in ranks_of(root / run).values():
            os.kill(pid, signal.SIGSTOP)  # they will not save
        started.signal(signal.SIGTERM)
        started.until("once more to leave at once")
        while "leaving at once" not in started.said() and living(root / run):
            started.signal(signal.SIGTERM)
        assert started.code() == 128 + signal.SIGTERM and living(root / run) == []
