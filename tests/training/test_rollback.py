"""To which checkpoint a run goes back, past which batches, and when it gives up."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from bad_runs import carry_out, write_data
from test_checkpoint_format import HALVES, write

from megaresid.config import HealthOptions
from megaresid.training import rollback
from megaresid.training.engine import Engine
from megaresid.training.health import Health
from megaresid.training.loop import Outcome
from megaresid.training.rollback import AT_MOST, Back, Rollbacks
from megaresid.training.run_dir import read_metrics


@pytest.fixture
def alone(monkeypatch):
    """One rank, without a process group."""
    monkeypatch.setattr(rollback.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(rollback.dist, "broadcast_object_list", lambda objects, src: None)
    monkeypatch.setattr(rollback, "agreed", lambda what: nullcontext())


def saved(run: Path, step: int, bad_in_a_row: int | None = 0) -> Path:
    counters = {} if bad_in_a_row is None else {"health": {"bad_in_a_row": bad_in_a_row}}
    return write(run / "checkpoints" / f"step_{step:08d}", HALVES, step=step, counters=counters)


def judged(step: int, bad: int = 2) -> Health:
    """After so many bad steps, ``step`` the last."""
    health = Health(HealthOptions())
    for one in range(step - bad, step):
        health.accepts(one + 1, float("nan"), 1.0)
    return health


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_back_to_the_newest_that_was_not_saved_between_skipped_updates(alone, tmp_path):
    """Newer ones are removed, for their steps come again; older ones stay."""
    saved(tmp_path, 3, None), saved(tmp_path, 6), saved(tmp_path, 9, 1), saved(tmp_path, 10, 2)
    back, line = Rollbacks(tmp_path).decide(True, judged(11), 40)
    assert back == Back(tmp_path / "checkpoints/step_00000006", 6, 40 + 5)
    assert line == "step 11: 2 bad steps in a row: going back to step_00000006, and past the batches of 5 steps"
    assert names(tmp_path) == ["step_00000003", "step_00000006"]


@pytest.mark.parametrize("name", ["checkpoint.json", "complete.json"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(alone, tmp_path, name):
    saved(tmp_path, 3)
    (saved(tmp_path, 6) / name).write_text("{}")
    back, _ = Rollbacks(tmp_path).decide(True, judged(11), 0)
    assert (back.step, back.skipped_batches) == (3, 8)


def test_one_checkpoint_is_gone_back_to_so_often_and_another_one_as_often_again(alone, tmp_path):
    saved(tmp_path, 3)
    rollbacks = Rollbacks(tmp_path)
    for _ in range(AT_MOST):
        assert isinstance(rollbacks.decide(True, judged(9), 0)[0], Back)
    outcome, line = rollbacks.decide(True, judged(9), 0)
    assert outcome is Outcome.UNHEALTHY
    assert f"the run stops after going back to it {AT_MOST} times; the last good checkpoint is step_00000003" in line
    saved(tmp_path, 6)
    assert isinstance(rollbacks.decide(True, judged(9), 0)[0], Back)
    assert AT_MOST == 3, "as the README says"


def test_where_it_is_not_wanted_or_not_possible_the_run_stops_and_nothing_is_removed(alone, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    outcome, line = Rollbacks(tmp_path).decide(True, judged(9), 0)
    assert outcome is Outcome.UNHEALTHY and "the run stops; there is no checkpoint; look into it by" in line
    saved(tmp_path, 3), saved(tmp_path, 6, 1)
    outcome, line = Rollbacks(tmp_path).decide(False, judged(9), 0)
    assert outcome is Outcome.UNHEALTHY and "the run stops; the last good checkpoint is step_00000003" in line
    assert names(tmp_path) == ["step_00000003", "step_00000006"]


class Damaging(Engine):
    """In the bad steps, a bit of the newest good checkpoint flips."""

    damaged: Path

    def train_step(self, *args):
        result = super().train_step(*args)
        if result.skipped and self.damaged.exists():
            data = bytearray(self.damaged.read_bytes())
            data[-5] ^= 4
            self.damaged.write_bytes(data)
        return result


def _damaged(run: str, data: str) -> tuple[str, list[str]]:
    Damaging.damaged = Path(run, "checkpoints/step_00000020/rank_00000.safetensors")
    return carry_out(run, data, 0, Damaging, on_spike="rollback", max_bad_steps=3)


def test_a_damaged_checkpoint_is_left_for_the_one_before_it_and_past_the_same_batches(ranks1, tmp_path):
    """Batches 22 to 24 are bad: step 17 comes again on batch 25, as step 21 would have."""
    run, data = tmp_path / "run", write_data(tmp_path / "data", bad={22, 23, 24})
    ((ended, said),) = ranks1.run(_damaged, str(run), str(data))
    assert ended == "FINISHED"
    assert any("going back to step_00000020, and past the batches of 5 steps" in line for line in said)
    rows = {row["step"]: row for row in read_metrics(run)}
    assert [rows[step]["skipped_batches"] for step in (16, 17, 20, 32)] == [0, 9, 9, 9]
    assert "damaged_step_00000020" in names(run) and "step_00000020" in names(run)
