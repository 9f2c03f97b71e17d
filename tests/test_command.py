"""The whole command in processes of its own: under DeepSpeed's launcher, under torchrun, and by itself."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.__main__ import main as data_prep
from megaresid.config import from_flat
from megaresid.data.shards import HEADER_BYTES
from megaresid.export import export
from megaresid.model.flops import training_flops_per_token
from megaresid.training.checkpoint import read_parameters
from megaresid.training.run_dir import read_metrics

STOP, END = 3, 7
MODEL = "--model tiny --layers 2 --width 32 --context 32 --dropout 0.1".split()
TRAINING = "--global-batch-size 8 --micro-batch-size 2 --learning-rate 1e-3".split()
INTERVALS = "--log-interval 1 --keep-checkpoints 0".split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder (with a space in its name) with data and a DeepSpeed JSON."""
    folder = tmp_path_factory.mktemp("a folder")
    rows = [json.dumps({"text": f"Line {n} of a text about the number {n * n}, and of others. " * 9}) for n in range(80)]
    (folder / "text.jsonl").write_text("\n".join(rows))
    options = ["--source", "jsonl", "--input", str(folder / "text.jsonl"), "--validation-fraction", "0.2"]
    data_prep([*options, "--out", str(folder / "data")])
    optimizer = {"type": "AdamW", "params": {"torch_adam": True, "fused": True}}
    (folder / "ds.json").write_text(json.dumps({"optimizer": optimizer, "zero_optimization": {"stage": 2}}))
    return folder


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def launchers() -> dict[str, list[str]]:
    return {
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", free_port()]
        + ["--module", "megaresid.train"],
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
        + ["-m", "megaresid.train"],
        "alone": ["-m", "megaresid.train"],
    }


def start(workplace: Path, launcher: str, *options: str, evaluation: str = "validation@2") -> tuple[int, str]:
    """Exit code and output; whatever it started is gone afterwards."""
    command = [sys.executable, *launchers()[launcher], "--deepspeed_config", str(workplace / "ds.json")]
    command += ["--data", str(workplace / "data"), *MODEL, *TRAINING, *INTERVALS, "--eval", evaluation]
    command += ["--steps", str(END), "--checkpoint-interval", str(STOP), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=240)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return process.returncode, said


@pytest.fixture(scope="module")
def whole(workplace) -> Path:
    """A run that nothing interrupted, on two ranks under DeepSpeed's launcher."""
    run = workplace / "whole"
    code, said = start(workplace, "deepspeed", "--run-dir", str(run))
    assert code == 0 and "TRAIN_METRICS: step=7, train_loss=" in said, said[-3000:]
    return run


def numbers(run: Path, after: int = -1) -> list[list]:
    """What a repeated run must repeat, row by row."""
    names = ("step", "train_loss", "val_loss", "gradient_norm", "learning_rate", "tokens")
    return [[row.get(name) for name in names] for row in read_metrics(run) if row["step"] > after]


def assert_equal_ends(*runs: Path) -> None:
    first, second = (read_parameters(run / "checkpoints" / f"step_{END:08d}") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_a_run_directory_describes_the_run(whole):
    for name in ("config.json", "ds_config.json", "spec.json", "environment.json", "data.json"):
        assert json.loads((whole / name).read_text())["schema"] == 1
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["ranks"] == 2 and "kernels" in environment
    spec, config = (json.loads((whole / name).read_text()) for name in ("spec.json", "config.json"))
    plan = from_flat({key: value for key, value in config.items() if key != "schema"}, "a run").plan()
    trained = read_parameters(whole / "checkpoints" / f"step_{END:08d}").values()
    padding = (50304 - 50257) * 32  # rows of the embedding that stand for no token
    assert spec["hash"] == plan.hash
    assert spec["parameters"] == sum(parameter.numel() for parameter in trained) - padding
    assert spec["flops_per_token"] == training_flops_per_token(plan)
    assert json.loads((whole / "outcome.json").read_text()) == {"schema": 1, "outcome": "finished", "step": END}
    assert list((whole / "tensorboard").iterdir())
    # Validations before step 1 and after 2, 4, 6 and 7, and a row of every step.
    assert [row["step"] for row in read_metrics(whole)] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 7]


@pytest.mark.full
def test_resume_into_another_directory_repeats_the_rest_bitwise(workplace, whole):
    resumed = workplace / "resumed"
    checkpoint = whole / "checkpoints" / f"step_{STOP:08d}"
    code, said = start(workplace, "deepspeed", "--run-dir", str(resumed), "--resume", str(checkpoint))
    assert code == 0, said[-3000:]
    assert numbers(resumed) == numbers(whole, after=STOP) and len(numbers(resumed)) == 7
    # Time spent on training goes on from the checkpoint's, so that loss over time is one curve.
    before = next(row["training_seconds"] for row in read_metrics(whole) if row["step"] == STOP)
    assert all(row["training_seconds"] > before for row in read_metrics(resumed) if "training_seconds" in row)
    assert_equal_ends(resumed, whole)


def test_resume_auto_in_the_same_directory_repeats_the_rest_bitwise_under_torchrun(workplace, whole):
    """A run that was killed after step 7 was logged and before anything past step 3 was saved."""
    killed = workplace / "killed"
    shutil.copytree(whole, killed)
    for step in (6, END):
        shutil.rmtree(killed / "checkpoints" / f"step_{step:08d}")
    code, said = start(workplace, "torchrun", "--run-dir", str(killed), "--resume", "auto")
    assert code == 0, said[-3000:]
    assert numbers(killed) == numbers(whole)
    assert_equal_ends(killed, whole)


@pytest.mark.full
def test_an_evaluation_that_was_cut_short_after_the_last_checkpoint_is_made_up_for(workplace, whole):
    cut = workplace / "cut short"
    shutil.copytree(whole, cut)
    *rows, last = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(last)["step"] == END and "val_loss" in json.loads(last)
    (cut / "metrics.jsonl").write_text("".join(rows))
    for _ in range(2):  # and once only
        code, said = start(workplace, "torchrun", "--run-dir", str(cut), "--resume", "auto")
        assert code == 0, said[-3000:]
        assert numbers(cut) == numbers(whole)


def test_init_from_takes_the_weights_and_nothing_else_in_a_single_process(workplace, whole):
    begun = workplace / "begun"
    code, said = start(workplace, "alone", "--run-dir", str(begun), "--init-from", str(whole), "--seed", "8")
    assert code == 0, said[-3000:]
    rows = read_metrics(begun)
    last = [row["val_loss"] for row in read_metrics(whole) if "val_loss" in row][-1]
    assert rows[0]["step"] == 0 and rows[0]["val_loss"] == pytest.approx(last, rel=1e-6)
    assert rows[1]["step"] == 1 and rows[1]["learning_rate"] == read_metrics(whole)[1]["learning_rate"]


def test_init_from_takes_the_weights_of_an_exported_folder(workplace, whole):
    export(whole, "safetensors", workplace / "exported")
    begun = workplace / "begun_from_exported"
    options = ("--run-dir", str(begun), "--init-from", str(workplace / "exported"))
    code, said = start(workplace, "alone", *options)
    assert code == 0, said[-3000:]
    last = [row["val_loss"] for row in read_metrics(whole) if "val_loss" in row][-1]
    assert read_metrics(begun)[0]["val_loss"] == pytest.approx(last, rel=1e-6)
    code, said = start(workplace, "alone", *options[2:], "--run-dir", str(workplace / "wide"), "--width", "24")
    assert code == 2 and "embed.tokens.weight has shape" in said


@pytest.mark.full
def test_a_strict_run_whose_hook_failed_goes_on_when_it_is_mended(workplace, whole, tmp_path, monkeypatch):
    """The hook draws random numbers and fails in its fifth call, after step 4, where no checkpoint is due."""
    hook = tmp_path / "hook_to_mend.py"
    hook.write_text(
        "import torch\ncalls = []\n\n"
        "def count(engine):\n"
        "    torch.rand(5)\n"
        "    calls.append(1)\n"
        "    return {'calls': len(calls) if len(calls) < 5 else 'five'}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    strict, evaluation = workplace / "strict", "hook_to_mend:count@1 validation@2"
    code, said = start(workplace, "deepspeed", "--run-dir", str(strict), "--eval-strict", evaluation=evaluation)
    assert code == 2, said[-3000:]
    failure = "evaluation hook_to_mend:count failed at step 4: calls is str, not a number"
    assert f"error: {failure}" in said and "Traceback" not in said
    assert [row["failed"] for row in read_metrics(strict) if "failed" in row] == [{"hook_to_mend:count": failure}]
    assert sorted(path.name for path in (strict / "checkpoints").glob("step_*")) == ["step_00000003", "step_00000004"]
    hook.write_text(hook.read_text().replace("'five'", "-1"))
    resuming = ["--run-dir", str(strict), "--resume", "auto", "--eval-strict"]
    code, said = start(workplace, "deepspeed", *resuming, evaluation=evaluation)
    assert code == 0, said[-3000:]
    steps, steps_of_whole = (
        [(row["step"], row["train_loss"], row["gradient_norm"]) for row in read_metrics(run) if "train_loss" in row]
        for run in (strict, whole)
    )
    assert steps == steps_of_whole and len(steps) == END
    assert_equal_ends(strict, whole)


@pytest.mark.full
def test_an_id_outside_the_vocabulary_that_only_a_batch_shows_ends_every_rank(workplace):
    """The manifest's largest id says nothing of it. Ids that the header's size still holds, in every window."""
    spoilt = workplace / "spoilt"
    spoilt.mkdir()
    shutil.copytree(workplace / "data", spoilt / "data")
    shutil.copy(workplace / "ds.json", spoilt)
    shard = spoilt / "data" / "train_000000.bin"
    content = bytearray(shard.read_bytes())
    tokens = np.frombuffer(content, dtype="<u2", offset=HEADER_BYTES)
    tokens[5::32] = 60_000
    shard.write_bytes(content)
    code, said = start(spoilt, "deepspeed", "--run-dir", str(spoilt / "run"))
    assert code == 2, said[-3000:]
    assert re.search(r"error: .*train_000000.bin: token \d+ is id 60000, outside the vocabulary of 50257", said), said
    assert "Traceback" not in said
