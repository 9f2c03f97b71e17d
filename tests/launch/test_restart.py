"""Faults in real runs under launch/train.sh: a rank that dies, one that stops, a launcher that is killed."""

import os
import re
import signal

import pytest
from supervised_runs import Started, family, launcher, left_of, living, make_workplace, ranks_of, training


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("restart"))


def start(root, name, run, *options):
    fast = {"MEGARESID_RESTART_SECONDS": "0.1", "MEGARESID_GRACE_SECONDS": "10"}
    command = [*launcher(name), *training(root, run), "--checkpoint-interval", "3", *options]
    return Started("bash", root / "launch/train.sh", *command, **fast)


@pytest.mark.full
@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_a_rank_that_dies_is_restarted_from_the_newest_checkpoint_and_one_that_stops_is_named(root, name):
    """One run, three faults: rank 1 killed, then rank 1 stopped, then no restart is left."""
    with start(root, name, name, "--hang-timeout", "3", "--restart", "1") as started:
        started.until("^step 5/")
        killed = ranks_of(root / name)[1]
        os.kill(killed, signal.SIGKILL)
        found = started.until(r"error: rank 1 \(process (\d+)\) on \S+ died at step (\d+)")
        assert int(found[1]) == killed and int(found[2]) >= 5
        started.until("died at step .*starting again in 0.1 s from the newest checkpoint; 0 restarts are left")
        resumed = int(started.until(r"^start +step (\d+) of ")[1])
        assert resumed % 3 == 0 and resumed >= 3
        assert int(started.until(r"^step (\d+)/")[1]) == resumed + 1
        started.until("^step ")
        stopped = ranks_of(root / name)[1]
        os.kill(stopped, signal.SIGSTOP)
        found = started.until(r"error: rank 1 has stopped, and the others have waited .*: process (\d+) on \S+")
        assert int(found[1]) == stopped
        assert started.code() == 1 and living(root / name) == []


@pytest.mark.full
@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_a_killed_supervisor_leaves_no_rank(root, name):
    run = f"{name} orphaned"
    with start(root, name, run) as started:
        started.until("^step 2/")
        below = family(started.pid)
        started.signal(signal.SIGKILL)
        started.code()
        assert left_of(below) == [] and living(root / run) == []


@pytest.mark.full
def test_a_killed_launcher_leaves_no_rank_and_its_own_code_is_not_believed(root):
    with start(root, "deepspeed", "launcher killed") as started:
        started.until("^step 2/")
        rank = ranks_of(root / "launcher killed")[0]
        stat = open(f"/proc/{rank}/stat").read()
        os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
        assert started.code() == 1 and living(root / "launcher killed") == []
        # Those that were dead when the supervisor looked: the system ends one before the other.
        who = r"(rank [01]|ranks [01] \(process \d+\), [01])"
        assert re.search(rf"^error: {who} \(process \d+\) on \S+ died at step \d", started.said(), re.MULTILINE)


@pytest.mark.full
def test_a_mistake_of_the_users_is_not_tried_again(root):
    """torchrun makes 1 of every code."""
    with start(root, "torchrun", "mistaken", "--global-batch-size", "7", "--restart", "3") as started:
        assert started.code() == 2
        assert "starting again" not in started.said() and "error: --global-batch-size" in started.said()
