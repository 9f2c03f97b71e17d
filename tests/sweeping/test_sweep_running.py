"""How a sweep carries out its runs, with a program in their place that writes what runs write."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sweeps import code_of, listed, make_place, options, starts

from megaresid.sweeping import process

STUB = Path(__file__).with_name("stub_run.py")
A, B = "vanilla-softmax-lr0.0003-seed1", "learned_scale-softmax-lr0.0003-seed1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("running"))


@pytest.fixture(autouse=True)
def stub(monkeypatch, tmp_path):
    """``stub(run={...})`` says what the stubs do. Their pipe is ``tmp_path / "pipe"``."""
    monkeypatch.setattr(process, "SUPERVISOR", STUB)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("STUB_PIPE", str(tmp_path / "pipe"))
    os.mkfifo(tmp_path / "pipe")
    return lambda **wanted: monkeypatch.setenv("STUB", json.dumps(wanted))


def when_held(pipe: Path, do) -> threading.Thread:
    """Call ``do`` with the name of the run that says first that it waits."""

    def wait():
        with open(pipe) as names:
            do(names.readline().strip())

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def outcome(out: Path, name: str) -> tuple[int, str]:
    found = json.loads((out / "outcomes" / f"{name}.json").read_bytes())
    return found["code"], found["line"]


def test_all_runs_finish_and_are_skipped_the_second_time(place, capfd):
    arguments = options(place, "all", seeds="2")
    assert code_of(arguments) == 0
    said = capfd.readouterr().out
    assert "ended     4 of 4 runs have finished" in said and said.count("finished  ") == 4
    assert code_of(arguments) == 0
    assert capfd.readouterr().out.count("skipped   ") == 4
    for run in listed(place / "all"):
        [start] = starts(place / "all", run["name"])
        assert start["first"] == 0 and start["resume"] == "auto"
        assert start["command"][:3] == ["python", "-m", "megaresid.train"]
        given = json.loads(Path(start["command"][-1]).read_bytes())
        assert given == run["config"] | {"run_dir": str(place / "all/runs" / run["name"]), "resume": "auto"}
        assert outcome(place / "all", run["name"]) == (0, "finished")


def test_enlarged_axes_run_what_is_new(place, capfd):
    assert code_of(options(place, "more")) == 0
    assert code_of(options(place, "more", seeds="1,2", residual="vanilla,learned_scale,rezero")) == 0
    said = capfd.readouterr().out
    assert said.count("skipped   ") == 2 and "ended     6 of 6" in said


@pytest.mark.parametrize("code", [1, 76, *(pytest.param(code, marks=pytest.mark.full) for code in (2, 137))])
def test_a_run_that_fails_is_told_and_the_sweep_goes_on(place, stub, capfd, code):
    out = f"failing {code}"
    stub(**{A: {"code": code}})
    assert code_of(options(place, out)) == 1
    said = capfd.readouterr()
    assert f"failed    {A}: exit code {code}" in said.err and "it is told to fail" in said.err
    assert len(said.err.splitlines()) == 1 and "ended     1 of 2 runs have finished" in said.out
    assert outcome(place / out, A)[0] == code and outcome(place / out, B)[0] == 0
    stub()
    diverged = code == 76
    assert code_of(options(place, out)) == (1 if diverged else 0), "it would diverge again, a fault may be gone"
    assert len(starts(place / out, A)) == (1 if diverged else 2)
    assert len(starts(place / out, B)) == 1
    if diverged:
        assert f"failed    {A}: exit code 76" in capfd.readouterr().err


def test_a_run_without_the_metrics_of_its_last_step_has_not_finished(place, stub, capfd):
    stub(**{A: {"metrics": False}})
    assert code_of(options(place, "no metrics")) == 1
    assert "its metrics have no step 3" in capfd.readouterr().err


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(one, marks=pytest.mark.full) for one in (signal.SIGTERM, signal.SIGHUP))]
)
def test_a_signal_stops_the_runs_which_save_and_the_same_command_goes_on(place, stub, tmp_path, capfd, number):
    out = f"stopped {number}"
    stub(**{A: {"hold": 2}})
    held = when_held(tmp_path / "pipe", lambda name: os.kill(os.getpid(), number))
    assert code_of(options(place, out)) == 75
    held.join(30)
    said = capfd.readouterr().out
    assert f"{signal.Signals(number).name}: the runs save and leave" in said and f"stopped   {A} at step 2" in said
    assert said.endswith("stopped   the same command goes on with what is left\n")
    assert starts(place / out, B) == [], "none is started any more"
    assert code_of(options(place, out)) == 0
    assert [start["first"] for start in starts(place / out, A)] == [0, 2]
    assert len(starts(place / out, B)) == 1


def test_a_run_that_somebody_stops_stops_the_sweep(place, stub, tmp_path, capfd):
    def stop(name):
        """The stub that holds: found by its configuration on the command line."""
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if f"{name}.json".encode() in command.read_bytes() and str(STUB).encode() in command.read_bytes():
                    os.kill(int(command.parent.name), signal.SIGTERM)
            except OSError:
                continue

    stub(**{A: {"hold": 1}})
    when_held(tmp_path / "pipe", stop)
    assert code_of(options(place, "somebody")) == 75
    assert f"{A} was sent a signal, which stops the sweep" in capfd.readouterr().out
    assert starts(place / "somebody", B) == []


def test_two_at_a_time_have_their_shares_of_the_cores(place, stub, monkeypatch, tmp_path):
    """Each waits until it is stopped, so that the signal can only come when both have been started."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    stub(**{A: {"hold": 1}, B: {"hold": 1}})
    names = []

    def both():
        while len(names) < 2:
            with open(tmp_path / "pipe") as pipe:
                names.extend(pipe.read().split())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=both, daemon=True).start()
    assert code_of(options(place, "two", jobs="2")) == 75
    assert sorted(names) == sorted([A, B])
    assert [starts(place / "two", name)[0]["OMP_NUM_THREADS"] for name in (A, B)] == ["6", "6"]


def test_jobs_have_gpus_of_their_own(monkeypatch):
    monkeypatch.setattr(process, "visible_devices", lambda: ["4", "5", "6", "7"])
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in process.slots(2, 2)] == ["4,5", "6,7"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in process.slots(3, 1)] == ["4", "5", "6"]
    with pytest.raises(process.UserError, match="--jobs 3 of --num-accelerators 2: there are 4 GPUs"):
        process.slots(3, 2)


@pytest.mark.parametrize("chosen, devices", [("", ["0", "1", "2"]), ("5,3,1", ["5", "3", "1"]), ("5,3", ["5", "3"])])
def test_gpus_that_are_hidden_are_not_used(monkeypatch, chosen, devices):
    import torch

    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    assert process.visible_devices() == devices


def test_several_ranks_start_under_torchrun_which_heeds_the_visible_gpus(place):
    assert code_of(options(place, "ranks", num_accelerators="2")) == 0
    [start] = starts(place / "ranks", A)
    assert start["command"][:6] == ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "megaresid.train"]


def test_a_run_that_starts_otherwise_than_another_of_its_seed_is_an_error(place, stub, capfd):
    stub(**{B: {"values": "others"}})
    assert code_of(options(place, "breach", seeds="1,2")) == 1
    line = f"failed    {B}: run {B} starts parameter embed.tokens.weight from other values than {A}, of the same seed"
    assert line in capfd.readouterr().err
    stub()
    assert code_of(options(place, "breach", seeds="1,2")) == 1, "its start is on record"
    assert line in capfd.readouterr().err
    assert len(starts(place / "breach", B)) == 1, "and it is not started again"


def test_a_run_that_starts_otherwise_is_stopped_at_once(place, stub, capfd):
    """It would wait for ever."""
    stub(**{B: {"values": "others", "hold": 1}})
    pipe = os.open(os.environ["STUB_PIPE"], os.O_RDWR)  # it finds a reader
    assert code_of(options(place, "breach at once")) == 1
    os.close(pipe)
    assert "it is stopped" in capfd.readouterr().out


def test_steps_are_measured_once_for_each_variant(place, stub, capfd):
    """The stub's steps take .5 s and .3 s by its own word; the first piece of the measurement does not count."""
    stub(**{"vanilla-softmax": {"pace": 0.5}, "learned_scale-softmax": {"pace": 0.3}})
    arguments = options(place, "seconds", seeds="1,2", budget="seconds=2")
    assert code_of(arguments) == 0
    assert {run["config"]["residual"]: run["steps"] for run in listed(place / "seconds")} == {
        "vanilla": 4,
        "learned_scale": 6,
    }
    calibration = place / "seconds/calibration/vanilla-softmax"
    assert len((calibration / "starts.jsonl").read_text().splitlines()) == 1
    given = json.loads((place / "seconds/configs/calibration-vanilla-softmax.json").read_bytes())
    assert (given["steps"], given["eval"], given["run_dir"]) == (20, "", str(calibration))
    stub(**{"vanilla-softmax": {"pace": 5.0}})
    assert code_of(options(place, "seconds", seeds="1,2,3", budget="seconds=2")) == 0
    assert [run["steps"] for run in listed(place / "seconds") if run["config"]["residual"] == "vanilla"] == [4, 4, 4]


def test_a_variant_that_cannot_be_measured_is_left_out(place, stub, capfd):
    stub(**{"vanilla-softmax": {"code": 2}})
    assert code_of(options(place, "unmeasured", budget="seconds=2")) == 1
    assert f"failed    {A}: not started, for the time of a step of vanilla-softmax" in capfd.readouterr().err
    assert starts(place / "unmeasured", A) == [] and len(starts(place / "unmeasured", B)) == 1


def test_one_task_of_an_array_is_one_run(place, stub, capfd):
    assert code_of([*options(place, "only"), "--slurm"]) == 0
    only = ["--out", str(place / "only"), "--only"]
    assert code_of([*only, "2"]) == 0
    assert starts(place / "only", A) == [] and len(starts(place / "only", B)) == 1
    assert code_of([*only, "2"]) == 0 and len(starts(place / "only", B)) == 1, "it has finished"
    stub(**{A: {"code": 76}})
    assert code_of([*only, "1"]) == 76
    assert code_of([*only, "1"]) == 76 and len(starts(place / "only", A)) == 1
    assert code_of([*only, "3"]) == 2
    assert "the sweep has runs 1 to 2" in capfd.readouterr().err


def test_tasks_of_an_array_are_held_against_the_others(place, stub, capfd):
    assert code_of([*options(place, "apart"), "--slurm"]) == 0
    stub(**{B: {"values": "others"}})
    assert code_of(["--out", str(place / "apart"), "--only", "1"]) == 0
    assert code_of(["--out", str(place / "apart"), "--only", "2"]) == 1


def test_a_second_sweep_in_the_folder_is_refused(place, stub, tmp_path, capfd):
    stub(**{A: {"hold": 1}})
    refused = []

    def second(name):
        done = subprocess.run(
            [sys.executable, "-c", LOCKED, str(place / "locked")], capture_output=True, text=True, timeout=60
        )
        refused.append(done.stdout)
        os.kill(os.getpid(), signal.SIGTERM)

    when_held(tmp_path / "pipe", second)
    assert code_of(options(place, "locked")) == 75
    assert "another sweep is at work there" in refused[0]


LOCKED = """
import sys
from pathlib import Path
from megaresid.errors import UserError
from megaresid.sweeping.folder import Folder
try:
    with Folder(Path(sys.argv[1])).locked():
        print("locked")
except UserError as error:
    print(error)
"""


def test_a_run_saves_and_leaves_where_the_sweep_is_killed(place, stub, tmp_path):
    """kill -9 of a process that has started one as the sweep does."""
    run = tmp_path / "killed"
    config = tmp_path / "killed.json"
    config.write_text(json.dumps({"run_dir": str(run), "steps": 9, "seed": 1, "residual": "a", "resume": "auto"}))
    stub(killed={"hold": 3})
    parent = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(STUB), str(config), str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    with open(tmp_path / "pipe") as pipe:
        assert pipe.readline() == "killed\n"
    gone = os.pidfd_open(child)
    parent.kill()
    parent.wait()
    assert select.select([gone], [], [], 30)[0], "it lives on"
    assert (run / "saved").read_text() == "3"
    os.close(gone)


KILLED = """
import os, sys, time
from pathlib import Path
from megaresid.sweeping import process
process.SUPERVISOR = Path(sys.argv[1])
print(process.start(Path(sys.argv[2]), Path(sys.argv[3]), 1, {}).pid, flush=True)
os.read(os.pipe()[0], 1)
"""
