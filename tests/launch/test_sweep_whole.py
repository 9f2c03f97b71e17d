"""Sweeps of real runs: stopped, killed and gone on with; failing and diverging ones; a budget of seconds."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from supervised_runs import PATIENCE, Started, living
from sweeps import listed, make_place, options

from megaresid.sweeping.folder import last_step, metrics_of

pytestmark = pytest.mark.full

FAILING = """
from megaresid.residual.stream import ResidualVariant, Site

class Breaking(Site):
    def write(self, state, context, normed, update):
        if update.shape[:2] == (4, 16):  # of a batch of the run: what is checked before it starts is smaller
            raise RuntimeError("a mistake of the user's")
        return (state[0] + update,)

class Mine(ResidualVariant):
    site_class = Breaking
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_place(tmp_path_factory.mktemp("whole"))
    (folder / "users_failing.py").write_text(FAILING)
    return folder


def started(place, arguments):
    environment = {"PYTHONPATH": str(place), "MEGARESID_GRACE_SECONDS": "200"}
    return Started(sys.executable, "-m", "megaresid.sweep", *arguments, **environment)


def wait_for(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


def final(out: Path) -> dict[str, float]:
    """The last training loss of each run."""
    return {run.name: metrics_of(run)[-1]["train_loss"] for run in (out / "runs").iterdir()}


def test_a_killed_sweep_goes_on_to_the_same_numbers(place):
    """kill -9 in the middle: the run saves and leaves, and its numbers are those of a sweep that nobody disturbs."""
    long = {"seeds": "1,", "budget": "tokens=6400"}
    with started(place, options(place, "whole", **long, jobs="2")) as sweep:
        assert sweep.code() == 0, sweep.said()
    with started(place, options(place, "killed", **long)) as sweep:
        sweep.until("^started ")
        first = next(run["name"] for run in listed(place / "killed"))
        run = place / "killed/runs" / first
        wait_for(lambda: last_step(run) >= 2)
        os.kill(sweep.pid, signal.SIGKILL)
        wait_for(lambda: not living(place / "killed/configs" / f"{first}.json"))
    assert 2 <= last_step(run) < 100 and list(run.glob("checkpoints/step_*/complete.json"))
    with started(place, options(place, "killed", **long)) as sweep:
        assert sweep.code() == 0, sweep.said()
    assert final(place / "killed") == final(place / "whole")
    assert all(last_step(one) == 100 for one in (place / "killed/runs").iterdir())


def test_a_stopped_sweep_leaves_no_process_and_goes_on(place):
    out = place / "stopped"
    with started(place, options(place, "stopped", budget="tokens=640000", jobs="2")) as sweep:
        sweep.until("^started ")
        sweep.until("^started ")
        names = [run["name"] for run in listed(out)]
        wait_for(lambda: all(last_step(out / "runs" / name) >= 1 for name in names))
        sweep.signal(signal.SIGINT)
        assert sweep.code() == 75, sweep.said()
        assert not any(living(out / "configs" / f"{name}.json") for name in names)
    for name in names:
        [checkpoint] = (out / "runs" / name / "checkpoints").glob("step_*")
        assert int(checkpoint.name[5:]) == last_step(out / "runs" / name)


def test_a_variant_that_raises_and_one_that_diverges_are_told_and_the_others_finish(place):
    axes = {"residual": "users_failing:Mine,vanilla", "learning_rates": "1e-3,1e14", "budget": "tokens=1280"}
    with started(place, [*options(place, "bad", **axes), "--max-bad-steps", "3", "--clip", "0"]) as sweep:
        assert sweep.code() == 1
        said = sweep.said()
    told = dict(re.findall(r"^failed    (\S+): (exit code \d+.*)$", said, re.MULTILINE))
    assert "a mistake of the user's" in (place / "bad/logs/users_failing-Mine-softmax-lr0.001-seed1.log").read_text()
    assert told.pop("users_failing-Mine-softmax-lr0.001-seed1").startswith(("exit code 1", "exit code 2"))
    assert told.pop("users_failing-Mine-softmax-lr1e+14-seed1")
    assert told.pop("vanilla-softmax-lr1e+14-seed1").startswith("exit code 76, stopped by the health guard")
    assert not told and "ended     1 of 4 runs have finished" in said


def test_a_budget_of_seconds_is_measured_and_kept_to(place):
    """The training of the run takes about what it may, by its own clock: the machine may be busy."""
    with started(place, options(place, "seconds", residual="vanilla", budget="seconds=4")) as sweep:
        assert sweep.code() == 0, sweep.said()
    [run] = listed(place / "seconds")
    tree = json.loads((place / "seconds/sweep.json").read_bytes())
    assert run["steps"] == int(4 / tree["step_seconds"]["vanilla-softmax"])
    [row] = [row for row in metrics_of(place / "seconds/runs" / run["name"]) if row["step"] == run["steps"]]
    assert 0.4 < row["training_seconds"] < 40
