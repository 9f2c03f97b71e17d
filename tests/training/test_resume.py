"""N steps, stop, M steps equal N + M steps, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from gpt_runs import ADAMW, FUSED_ADAMW, SGD, configuration, micro_batches, start_engine

from megaresid.evaluation.validation import Validation
from megaresid.training.checkpoint import load_checkpoint, read_parameters, save_checkpoint
from megaresid.training.run_dir import read_metrics
from megaresid.training.schedule import learning_rate

STOP, END = 3, 7


def run_steps(engine, config, first: int, last: int) -> list[tuple[float, float]]:
    """(this rank's own loss, gradient norm) of steps [first, last)."""
    source = micro_batches(config, engine.batch, torch.distributed.get_rank(), first)
    rate = [learning_rate(step, 20, config.optimizer) for step in range(last)]
    results = [engine.train_step(source, rate[step]) for step in range(first, last)]
    return [(result.loss.item(), result.gradient_norm) for result in results]


def checkpoint_of(engine, folder: Path, step: int) -> Path:
    return save_checkpoint(engine.deepspeed, engine.parameters, folder, step=step, counters={}, identity={})


def uninterrupted_and_resumed(stage: int, optimizer: dict, folder: str):
    """Runs on every rank: the last steps of both runs, and their final parameters."""
    config = configuration(dropout=0.1, micro_batch_size=2, steps=20)
    tree = {"optimizer": optimizer, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    root = Path(folder)

    torch.manual_seed(100 + torch.distributed.get_rank())
    engine = start_engine(config, tree, folder)
    torch.manual_seed(100 + torch.distributed.get_rank())
    run_steps(engine, config, 0, STOP)
    stopped = checkpoint_of(engine, root / "whole", STOP)
    expected = run_steps(engine, config, STOP, END)
    end = checkpoint_of(engine, root / "whole", END)
    engine.deepspeed.destroy()

    torch.manual_seed(999)  # whatever the generators were, the checkpoint's own count
    engine = start_engine(config, tree, folder)
    state = load_checkpoint(engine.deepspeed, engine.parameters, stopped)
    found = run_steps(engine, config, state.step, END)
    resumed_end = checkpoint_of(engine, root / "resumed", END)
    engine.deepspeed.destroy()
    return expected, found, read_parameters(end), read_parameters(resumed_end)


@pytest.mark.parametrize("stage, optimizer", [(0, FUSED_ADAMW), (1, FUSED_ADAMW), (2, ADAMW), (3, FUSED_ADAMW), (1, SGD)])
def test_a_resumed_run_repeats_the_uninterrupted_one_bitwise(stage, optimizer, ranks2, tmp_path):
    """On two ranks, with dropout (each rank its own generator), in the middle of the learning rate's course."""
    first, second = ranks2.run(uninterrupted_and_resumed, stage, optimizer, str(tmp_path))
    assert first[0] != second[0], "both ranks drew the same: one generator would do, and the test would not see it"
    for expected, found, end, resumed_end in (first, second):
        assert found == expected
        assert end.keys() == resumed_end.keys()
        for name, parameter in end.items():
            assert torch.equal(parameter, resumed_end[name]), name


def evaluated_and_not(folder: str):
    """Runs on every rank: losses with a validation after each step, and without."""
    config = configuration(dropout=0.1)
    tree = {"optimizer": ADAMW, "zero_optimization": {"stage": 3}}

    class Stream:
        def __len__(self):
            return 300

        def read_windows(self, windows, context):
            return (windows[:, None] + torch.arange(context + 1).numpy()) % 50

    found = []
    for evaluates in (False, True):
        engine = start_engine(config, tree, folder)
        torch.manual_seed(torch.distributed.get_rank())
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        sizes = {"context": config.shape.context, "tokens": 300, "micro_batch": 5, "vocab_size": 300}
        validation = Validation(Stream(), rank=rank, ranks=ranks, **sizes)
        losses = []
        for step in range(3):
            losses += run_steps(engine, config, step, step + 1)
            if evaluates:
                assert validation(engine)["val_loss"] > 0
        engine.deepspeed.destroy()
        found.append(losses)
    return found


def test_evaluation_changes_nothing_of_the_training_that_follows(ranks2, tmp_path):
    """ZeRO-3, where an evaluation gathers and frees every parameter; 12 windows do not divide by 2 x 5."""
    for without, with_evaluation in ranks2.run(evaluated_and_not, str(tmp_path)):
        assert without == with_evaluation


def launch(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29613"]
    command += ["--module", "megaresid.train", "--deepspeed_config", str(folder / "ds.json"), "--data", str(folder / "data")]
    command += ["--model", "tiny", "--layers", "2", "--width", "32", "--context", "32", "--dropout", "0.1"]
    command += ["--global-batch-size", "8", "--micro-batch-size", "2", "--learning-rate", "1e-3", "--steps", str(END)]
    command += ["--log-interval", "1", "--validation-interval", "2", "--checkpoint-interval", str(STOP)]
    command += ["--keep-checkpoints", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_whole_command_resumes_bitwise_under_the_launcher(tmp_path):
    from data_prep.__main__ import main as data_prep

    text = tmp_path / "text.jsonl"
    rows = [json.dumps({"text": f"Line {n} of a text about the number {n * n}, and of others. " * 9}) for n in range(80)]
    text.write_text("\n".join(rows))
    data_prep(["--source", "jsonl", "--input", str(text), "--out", str(tmp_path / "data"), "--validation-fraction", "0.2"])
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": ADAMW, "zero_optimization": {"stage": 2}}))

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    said = launch(tmp_path, "--run-dir", str(whole))
    assert "TRAIN_METRICS: step=7, train_loss=" in said
    launch(tmp_path, "--run-dir", str(resumed), "--resume", str(whole / "checkpoints" / f"step_{STOP:08d}"))

    names = ("step", "train_loss", "val_loss", "gradient_norm", "learning_rate", "tokens")
    expected = [[row.get(name) for name in names] for row in read_metrics(whole) if row["step"] > STOP]
    found = [[row.get(name) for name in names] for row in read_metrics(resumed)]
    assert found == expected and len(found) == 4 + 3  # four steps, validations after 4, 6 and 7
    ends = [read_parameters(run / "checkpoints" / f"step_{END:08d}") for run in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0] | ends[1])

    launch(tmp_path, "--run-dir", str(tmp_path / "begun"), "--init-from", str(whole), "--seed", "8", "--dropout", "0")
    begun = read_metrics(tmp_path / "begun")
    last = [row["val_loss"] for row in read_metrics(whole) if "val_loss" in row][-1]
    assert begun[0]["step"] == 0 and begun[0]["val_loss"] == last, "the weights are not those that the run ended with"
    assert begun[1]["step"] == 1 and begun[1]["train_loss"] != read_metrics(whole)[1]["train_loss"]

    for name in ("config.json", "ds_config.json", "spec.json", "environment.json", "data.json"):
        assert json.loads((whole / name).read_text())["schema"] == 1
