"""Hooks that fail: what is told and recorded, on which ranks, and whether the run goes on."""

import json
import math
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist
from hooked_runs import END, Run, raises, validation

from megaresid.errors import UserError
from megaresid.evaluation import running
from megaresid.evaluation.hook import Hook
from megaresid.training.checkpoint import read_parameters


def text(engine):
    return {"accuracy": "0.5"}


def nothing(engine):
    return None


def training_own(engine):
    return {"train_loss": 1.0}


def blank(engine):
    return {"my loss": 1.0}


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError


def unspeakable(engine):
    raise Unspeakable


def leaves(engine):
    raise SystemExit(0)


def too_large(engine):
    return {"large": 10**400}


def not_finite(engine):
    return {"worst": math.nan, "unbounded": math.inf, "count": 3}


def another(engine):
    return {"count": 4}


FAILURES = {
    text: "accuracy is str, not a number",
    nothing: "it returned NoneType, not a dictionary",
    training_own: "train_loss is a name of the training's own",
    blank: "'my loss' is no name of a number",
    another: "count is not_finite's: choose another name",
    raises: "ValueError: no luck (",
    unspeakable: "Unspeakable: <exception str() failed> (",
    leaves: "SystemExit: 0 (",
    too_large: "int too large to convert to float",
}


def on_rank_1_alone(engine):
    found = validation(engine)
    if dist.get_rank() == 1:
        raise OSError("no disk")
    return {"other": found["val_loss"]}


def in_the_midst(engine):
    if dist.get_rank() == 0:
        raise OSError("no disk")
    return validation(engine)


def hook_of(measure, interval=END) -> Hook:
    return Hook(measure.__name__, interval, measure)


def run_with_failures(folder: str):
    """Runs on every rank."""
    hooks = [hook_of(measure) for measure in (not_finite, *FAILURES, on_rank_1_alone)]
    run = Run(folder, "run", hooks=[*hooks, hook_of(validation, 2)])
    assert run.error is None
    return run.told.rows, run.told.lines, run.told.named("train_loss")


def test_each_failure_is_told_and_recorded_and_the_run_goes_on(ranks2, tmp_path):
    for rows, lines, trained in ranks2.run(run_with_failures, str(tmp_path)):
        assert len(trained) == END
        for step in (0, END):
            failed = {}
            for row in rows:
                failed |= row.get("failed", {}) if row["step"] == step else {}
            for measure, message in FAILURES.items():
                said = failed.pop(measure.__name__)
                assert said.startswith(f"evaluation {measure.__name__} failed at step {step}: ") and message in said
                assert "\n" not in said and said in lines and "running.py" not in said and "on rank" not in said
            said = failed.pop("on_rank_1_alone")
            assert "OSError: no disk (" in said and "test_failing_hooks.py, line" in said and not failed
            assert said.endswith(" (on rank 1)")
            # A name stays its first owner's, and what is not finite is a number too.
            row = next(row for row in rows if row["step"] == step and "count" in row)
            assert math.isnan(row["worst"]) and row["unbounded"] == math.inf and row["count"] == 3
            assert row["seconds/not_finite"] >= 0
        assert [row["step"] for row in rows if "val_loss" in row] == [0, 2, 4]
        assert not any({"other", "accuracy", "my loss"} & row.keys() for row in rows)


def test_the_place_of_a_failure_is_the_line_in_the_hooks_own_file():
    """Of a function whose failure is in a library that it calls, and of an object."""

    class Measure:
        def __call__(self, engine):
            return json.loads("{")

    for measure in (Measure(), Measure().__call__):
        with pytest.raises(ValueError) as caught:
            measure(None)
        said = running._told(caught.value, Hook("mine", 1, measure))
        assert said.startswith("json.decoder.JSONDecodeError: Expecting property name") and f"({__file__}, line" in said


def run_strictly(folder: str):
    """Runs on every rank: a hook that fails from step 3 on."""
    seen = []

    def fails_at_3(engine):
        seen.append(len(seen))
        if len(seen) > 3:
            raise ValueError("no luck")
        return {}

    run = Run(folder, "strict", hooks=[Hook("mine", 1, fails_at_3), hook_of(validation, 1)], strict=True)
    first = Run(folder, "first", hooks=[hook_of(raises, 2)], strict=True)
    return run.error, run.saved, run.told.named("val_loss"), first.error, first.saved


def test_a_strict_run_saves_its_state_and_ends_with_the_failure(ranks2, tmp_path):
    for error, saved, validated, first_error, first_saved in ranks2.run(run_strictly, str(tmp_path)):
        assert isinstance(error, UserError) and "evaluation mine failed at step 3: ValueError" in str(error)
        assert list(saved) == [2, 3] and read_parameters(saved[3])
        assert [step for step, _ in validated] == [0, 1, 2, 3], "the other hooks of that step ran"
        assert "evaluation raises failed at step 0" in str(first_error) and first_saved == {}


def run_left_waiting(folder: str):
    """Runs on every rank: rank 0 fails before the collectives of the others. Its process would end by that, and the
    launcher would end the others; here the pool kills them."""
    with mock.patch.object(running, "PATIENCE", timedelta(seconds=1)):
        raise Run(folder, "run", hooks=[hook_of(in_the_midst)]).error


@pytest.mark.full
def test_a_rank_that_left_the_others_waiting_ends(ranks2, tmp_path, monkeypatch):
    monkeypatch.setattr("ranks.GRACE_SECONDS", 2.0)
    with pytest.raises(UserError, match="in_the_midst failed on this rank alone .*no disk.* go on with it by --resume"):
        ranks2.run(run_left_waiting, str(tmp_path), timeout=60)
