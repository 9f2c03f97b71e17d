"""The command with --pipeline-stages, in processes of its own, beside the run that it goes on with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from megaresid.train import main as train
from megaresid.training.run_dir import read_metrics

STOP, END = 3, 8
MODEL = ["--model", "tiny", "--layers", "4", "--width", "32", "--context", "32", "--residual", "dense_former"]
TRAINING = ["--global-batch-size", "8", "--micro-batch-size", "2", "--learning-rate", "1e-3", "--log-interval", "1"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    texts = (f"Line {n} of a text about the number {n * n}, and of others. " * 9 for n in range(80))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = ["--source", "jsonl", "--input", str(folder / "text.jsonl"), "--validation-fraction", "0.2"]
    data_prep([*options, "--out", str(folder / "data")])
    for stage in (1, 2):
        tree = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "zero_optimization": {"stage": stage}}
        (folder / f"zero{stage}.json").write_text(json.dumps(tree))
    return folder


def options(workplace: Path, stage: int, run: str, *more: str) -> list[str]:
    given = ["--deepspeed-config", str(workplace / f"zero{stage}.json"), "--data", str(workplace / "data")]
    given += [*MODEL, *TRAINING, "--steps", str(END), "--checkpoint-interval", str(STOP), "--keep-checkpoints", "0"]
    return given + ["--eval", "validation@4", "--run-dir", str(workplace / run), *more]


def start(*given: str) -> str:
    """What two ranks said, which ended well."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run(
        [*launcher, "-m", "megaresid.train", *given], capture_output=True, text=True, env=environment, timeout=280
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    return ended.stdout


def assert_same_numbers(run: Path, expected: Path, after: int) -> None:
    """Losses, norms and validation of every step behind ``after``."""
    rows, wanted = ([row for row in read_metrics(folder) if row["step"] > after] for folder in (run, expected))
    assert [row["step"] for row in rows] == [row["step"] for row in wanted] and rows
    for row, other in zip(rows, wanted):
        assert row.keys() == other.keys()
        for name, tolerance in (("train_loss", 1e-5), ("val_loss", 1e-5), ("gradient_norm", 1e-4)):
            if name in other:
                assert row[name] == pytest.approx(other[name], abs=tolerance), (row["step"], name)
        assert row.get("learning_rate") == other.get("learning_rate") and row["tokens"] == other["tokens"]


@pytest.mark.full
def test_a_run_goes_on_as_a_pipeline_and_back(workplace):
    """Three starts of two ranks: ZeRO 2 to the end, two stages from its checkpoint of step 3, ZeRO 2 from theirs."""
    start(*options(workplace, 2, "whole"))
    checkpoint = workplace / "whole" / "checkpoints" / f"step_{STOP:08d}"
    told = start(*options(workplace, 1, "stages", "--pipeline-stages", "2", "--resume", str(checkpoint)))
    assert "stage 0 of 2: embedding, layer" in told and "SEED_LAYERS" not in told
    assert_same_numbers(workplace / "stages", workplace / "whole", after=STOP)
    checkpoint = workplace / "stages" / "checkpoints" / f"step_{2 * STOP:08d}"
    start(*options(workplace, 2, "back", "--resume", str(checkpoint)))
    assert_same_numbers(workplace / "back", workplace / "whole", after=2 * STOP)


def test_a_mistake_is_told_in_one_line_before_the_start(workplace, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for stage, more, told in (
        (1, ["--pipeline-stages", "3"], "--pipeline-stages 3 does not divide the 4 ranks"),
        (2, ["--pipeline-stages", "2"], "takes ZeRO 0 or 1"),
        (1, ["--pipeline-stages", "4", "--layers", "2"], "the model has 2 layers"),
        (1, ["--pipeline-stages", "2", "--residual", "shared_token_gate"], "share no module"),
        (1, ["--pipeline-stages", "0"], "--pipeline-stages 0: must be at least 1"),
    ):
        with pytest.raises(SystemExit) as left:
            train(options(workplace, stage, "refused", *more, "--dry-run"))
        said = capsys.readouterr()
        assert left.value.code == 2 and told in said.err and len(said.err.strip().splitlines()) == 1, said
    train(options(workplace, 1, "refused", "--pipeline-stages", "2", "--dry-run"))
    assert "stage 1 of 2" in capsys.readouterr().out
