"""The Slurm job array of a sweep: its script, run by bash with Slurm's programs played."""

import contextlib
import os
import re
import signal
import subprocess

import pytest
from sweeps import code_of, listed, make_place, options

from megaresid.sweeping.slurm import ranges


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("my array"))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize(
    "numbers, text", [([1], "1"), ([1, 2, 3], "1-3"), ([2, 4, 5, 9], "2,4-5,9"), ([1, 2, 4, 5, 6], "1-2,4-6")]
)
def test_ranges(numbers, text):
    assert ranges(numbers) == text


def script_of(place, out, capsys, **changes):
    capsys.readouterr()
    assert code_of([*options(place, out, **changes), "--slurm"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("#!/usr/bin/env bash\n"), "nothing else is printed"
    return said


def test_finished_runs_are_left_out(place, capsys):
    out = place / "left"
    assert "#SBATCH --array=1-4%2\n" in script_of(place, "left", capsys, seeds="2", jobs="2")
    for number, run in enumerate(listed(out), 1):
        name = run["name"]
        (out / "runs" / name).mkdir(parents=True)
        (out / "outcomes").mkdir(exist_ok=True)
        (out / "outcomes" / f"{name}.json").write_text('{"schema": 1, "code": 0, "line": "finished"}')
        step = 3 if number in (2, 3) else 2
        (out / "runs" / name / "metrics.jsonl").write_text('{"step": %d, "train_loss": 1.0}\n' % step)
    assert "#SBATCH --array=1,4\n" in script_of(place, "left", capsys, seeds="2")
    for run in listed(out):
        (out / "runs" / run["name"] / "metrics.jsonl").write_text('{"step": 3, "train_loss": 1.0}\n')
    assert code_of([*options(place, "left", seeds="2"), "--slurm"]) == 2
    assert "have finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    "warned, code, requeued", [(True, 75, True), (False, 75, False), (True, 0, False), (True, 76, False)]
)
def test_a_task_that_runs_out_of_time_is_put_back(place, tmp_path, capsys, warned, code, requeued):
    """The run is played by a program that ends when it is told: by SIGTERM, or by its pipe."""
    text = script_of(place, "task", capsys)
    program = tmp_path / "python"
    program.write_text(f"#!/bin/bash\ntrap 'exit {code}' TERM\necho \"$@\"\nread -r word < step & wait\nexit {code}\n")
    program.chmod(0o755)
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" > requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    text, count = re.subn(r"(?m)^.*(?= -m megaresid\.sweep)", str(program), text)
    assert count == 1
    (tmp_path / "job.sbatch").write_text(text)
    os.mkfifo(tmp_path / "step")
    task = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "42", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with contextlib.ExitStack() as stack:
        batch = subprocess.Popen(
            ["bash", "job.sbatch"], cwd=tmp_path, env=os.environ | task, stdout=subprocess.PIPE, text=True
        )
        stack.callback(batch.kill)
        assert batch.stdout.readline() == f"-m megaresid.sweep --out {place / 'task'} --only 2\n"
        pipe = os.open(tmp_path / "step", os.O_RDWR)
        if warned:
            batch.send_signal(signal.SIGUSR1)
        else:
            os.write(pipe, b"stop\n")
        assert batch.wait(60) == code
        os.close(pipe)
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 42_2\n"
