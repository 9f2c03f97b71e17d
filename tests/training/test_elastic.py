"""A run goes on with other ranks and another ZeRO stage: the same batches, the losses of a run that never stopped."""

import json
import shutil
from pathlib import Path

import pytest
from ranks import RankPool
from whole_runs import make_data, whole_run

from megaresid.training.checkpoint_format import checkpoints_in, step_of
from megaresid.training.run_dir import read_metrics

ADAMW = {"type": "AdamW", "params": {"torch_adam": True}}
STOP, END = 5, 25


def options(data: Path, run: Path, **others) -> dict:
    course = {"steps": END, "checkpoint_interval": STOP, "learning_rate": 1e-3, "warmup_fraction": 0.0, "clip": 1.0}
    return {"data": [data], "run_dir": run} | course | others


def tree(stage: int) -> dict:
    return {"optimizer": ADAMW, "zero_optimization": {"stage": stage}}


@pytest.fixture(scope="module")
def whole(ranks2, tmp_path_factory) -> Path:
    """The uninterrupted run of two ranks under ZeRO-2, beside its data."""
    folder = tmp_path_factory.mktemp("elastic")
    data, run = make_data(folder), folder / "whole"
    assert ranks2.run(whole_run, options(data, run), tree(2)) == ["finished"] * 2
    return run


def stopped(whole: Path, run: Path) -> Path:
    """The run as it was at step STOP."""
    shutil.copytree(whole, run)
    for checkpoint in checkpoints_in(run / "checkpoints"):
        if step_of(checkpoint) > STOP:
            shutil.rmtree(checkpoint)
    return run


def assert_goes_on(ranks, whole: Path, run: Path, stage: int) -> None:
    others = options(whole.parent / "data", stopped(whole, run), resume="auto")
    assert set(ranks.run(whole_run, others, tree(stage))) == {"finished"}
    found, expected = read_metrics(run), read_metrics(whole)
    assert [row["step"] for row in found] == list(range(1, END + 1))
    assert found[:STOP] == expected[:STOP]
    for row, wanted in zip(found[STOP:], expected[STOP:], strict=True):
        assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=0, abs=1e-5), row["step"]
        assert row["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-4), row["step"]
        assert row["learning_rate"] == wanted["learning_rate"] and row["tokens"] == wanted["tokens"]
    header = json.loads((run / "checkpoints" / f"step_{END:08d}" / "checkpoint.json").read_text())
    assert header["world_size"] == ranks.ranks


@pytest.mark.parametrize(
    "stage, ranks",
    [
        (0, "ranks1"),
        (3, "ranks2"),
        pytest.param(0, "ranks2", marks=pytest.mark.full),
        pytest.param(1, "ranks1", marks=pytest.mark.full),
        pytest.param(1, "ranks2", marks=pytest.mark.full),
        pytest.param(2, "ranks1", marks=pytest.mark.full),
        pytest.param(2, "ranks2", marks=pytest.mark.full),
        pytest.param(3, "ranks1", marks=pytest.mark.full),
    ],
)
def test_a_run_saved_by_two_ranks_under_zero_2_goes_on_elsewhere(request, whole, tmp_path, ranks, stage):
    assert_goes_on(request.getfixturevalue(ranks), whole, tmp_path / "run", stage)


@pytest.mark.full
def test_it_goes_on_with_four_ranks_under_every_stage(whole, tmp_path):
    pool = RankPool(4)
    try:
        for stage in range(4):
            assert_goes_on(pool, whole, tmp_path / f"run{stage}", stage)
    finally:
        pool.close()


def test_the_course_tells_one_data_order_and_optimizer_state_from_another(whole):
    """What the tolerances above stand against: losses of successive steps are far apart."""
    losses = [row["train_loss"] for row in read_metrics(whole)]
    assert min(abs(one - other) for one, other in zip(losses, losses[1:])) > 1e-4
    assert losses[-1] < losses[0] - 0.5
