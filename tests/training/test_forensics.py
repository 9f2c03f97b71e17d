"""What is kept of bad steps, and the way back past them: runs over data with bad batches."""

import json
import math
import shutil

import pytest
import torch
import torch.distributed as dist
from bad_runs import OVERFLOWS, STEPS, Overflowing, carry_out, write_data
from gpt_runs import ADAMW, configuration, micro_batches, plan_of, start_engine
from test_health import ENGINES

from megaresid.model.gpt import build, canonical_parameters
from megaresid.training.checkpoint import read_parameters
from megaresid.training.forensics import by_layer, nearest_checkpoint, parameter_and_gradient_norms
from megaresid.training.run_dir import read_metrics

BAD = range(22, 25)


def norms_before_the_update(sections: dict, folder: str):
    """Runs on every rank: of the second step, which is refused."""
    config, found = configuration(micro_batch_size=2), []
    engine = start_engine(config, {"optimizer": ADAMW} | sections, folder)
    source = micro_batches(config, engine.batch, dist.get_rank())
    engine.train_step(source, 0.01)

    def refuse(*_):
        found.append(parameter_and_gradient_norms(engine.deepspeed, engine.parameters))
        return False

    result = engine.train_step(source, 0.01, refuse)
    engine.deepspeed.destroy()
    return found[0], result.gradient_norm


def true_norms():
    """The definition: a plain loop's parameters and gradients, whole."""
    config = configuration()
    model = build(plan_of(config), config.run.seed)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": decayed, "weight_decay": config.optimizer.weight_decay}]
    groups += [{"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    stepper = torch.optim.AdamW(groups, lr=0.01, betas=config.optimizer.betas)
    batch = type("Whole", (), {"ranks": 1, "micro": 8, "accumulation": 1})
    source = micro_batches(config, batch, 0)
    for step in range(2):
        stepper.zero_grad()
        model(*next(source))[1].backward()
        if step == 0:
            stepper.step()
    parameters = canonical_parameters(model, model.prefixes)
    return {name: (p.norm().item(), p.grad.norm().item()) for name, p in parameters.items()}


@pytest.mark.parametrize("name", ENGINES)
def test_norms_are_those_of_whole_gradients_under_every_engine(name, ranks2, tmp_path):
    expected = true_norms()
    for found, norm in ranks2.run(norms_before_the_update, ENGINES[name], str(tmp_path)):
        assert found.keys() == expected.keys()
        for parameter, pair in expected.items():
            # A bias of keys has no true gradient.
            assert found[parameter] == pytest.approx(pair, rel=2e-4, abs=1e-6), parameter
        layers = by_layer(found)
        assert set(layers) == {"embed", "layers.00", "layers.01", "head"}
        assert math.hypot(*(gradient for _, gradient in layers.values())) == pytest.approx(norm, rel=1e-5)


def kept(run, step: int) -> dict:
    return json.loads((run / "forensics" / f"step_{step:08d}.json").read_text())


def test_an_overflow_stops_the_run_and_is_kept_by_name(ranks2, tmp_path):
    data, run = write_data(tmp_path / "data"), tmp_path / "run"
    options = {"max_bad_steps": 3, "checkpoint_interval": 2}
    outcomes = ranks2.run(_overflowing, str(run), str(data), options)
    assert [outcome for outcome, _ in outcomes] == ["UNHEALTHY"] * 2
    said = outcomes[0][1][-1]
    assert "step 5: 3 bad steps in a row: the run stops; the last good checkpoint is step_00000002" in said
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000002"]
    assert json.loads((run / "outcome.json").read_text()) == {"schema": 1, "outcome": "unhealthy", "step": 5}
    files = sorted(path.name for path in (run / "forensics").iterdir())
    assert files == [f"step_{step:08d}.json" for step in (3, 4, 5)]
    tree = kept(run, 3)
    assert tree["reason"] == "the loss is not finite" and tree["updated"] is False
    assert nearest_checkpoint(run, 3).name == "step_00000002" and nearest_checkpoint(run, 2) is None
    assert tree["parameters"][OVERFLOWS]["norm"] > 1e36
    assert [rank["samples"] for rank in tree["ranks"]] == [[[16, 17], [20, 21]], [[18, 19], [22, 23]]]
    assert tree["ranks"][0]["generators"]["cpu"] != tree["ranks"][1]["generators"]["cpu"]
    rows = [row for row in read_metrics(run) if row["step"] > 2]
    assert [row["skipped_steps"] for row in rows] == [1, 2, 3]


def _overflowing(run, data, options):
    return carry_out(run, data, 2, Overflowing, **options)


def end_of(run) -> dict[str, torch.Tensor]:
    return read_parameters(run / "checkpoints" / f"step_{STEPS:08d}")


def assert_same_end(one, other):
    one, other = end_of(one), end_of(other)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _run(run, data, stage, options):
    return carry_out(run, data, stage, **options)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.full)])
def test_a_rollback_is_the_run_over_data_without_those_batches(stage, ranks2, tmp_path):
    """Batches 22 to 24 are bad: back to step 20, past batches 20 to 24. The definition is a run whose data never had
    those: equal bit for bit, and so is a run resumed after going back, from later and from before. With dropout, whose
    generators go back too."""
    options = {"on_spike": "rollback", "max_bad_steps": 3, "dropout": 0.1}
    run, plain, resumed = tmp_path / "run", tmp_path / "plain", tmp_path / "resumed"
    data = write_data(tmp_path / "data", bad=set(BAD))
    (ended, said), _ = ranks2.run(_run, str(run), str(data), stage, options)
    assert ended == "FINISHED"
    assert "step 25: 3 bad steps in a row: going back to step_00000020, and past the batches of 5 steps" in said
    without = write_data(tmp_path / "without", without=range(20, 25))
    assert ranks2.run(_run, str(plain), str(without), stage, {"dropout": 0.1})[0][0] == "FINISHED"
    assert_same_end(run, plain)
    rows = {row["step"]: row for row in read_metrics(run)}
    assert [rows[step]["skipped_batches"] for step in (20, 21, STEPS)] == [0, 5, 5]
    assert rows[STEPS]["train_loss"] == read_metrics(plain)[-1]["train_loss"]
    assert [kept(run, step)["skipped_batches"] for step in (23, 24, 25)] == [0, 0, 0]

    shutil.copytree(run, resumed)
    for step in (28, 32):
        shutil.rmtree(resumed / "checkpoints" / f"step_{step:08d}")
    ranks2.run(_run, str(resumed), str(data), stage, options | {"resume": "auto"})
    assert_same_end(resumed, run)
    shutil.rmtree(resumed / "checkpoints" / "step_00000024")  # the first one after going back
    for step in (28, 32):
        shutil.rmtree(resumed / "checkpoints" / f"step_{step:08d}")
    ranks2.run(_run, str(resumed), str(data), stage, options | {"resume": "auto"})
    assert_same_end(resumed, run)


def test_going_back_ends_where_it_does_not_help(ranks1, tmp_path):
    """All from batch 22 on is bad."""
    data, run = write_data(tmp_path / "data", bad=set(range(22, 60))), tmp_path / "run"
    (ended, said), = ranks1.run(_run, str(run), str(data), 0, {"on_spike": "rollback", "max_bad_steps": 2})
    assert ended == "UNHEALTHY"
    assert sum("going back to step_00000020" in line for line in said) == 3
    assert "the run stops after going back to it 3 times" in said[-1]


def test_the_number_of_files_is_bounded(ranks1, tmp_path):
    """Bad steps 1 to 20, and then every 10th."""
    data, run = write_data(tmp_path / "data"), tmp_path / "run"
    options = {"max_bad_steps": 1000, "checkpoint_interval": 2, "steps": 45}
    ranks1.run(_overflowing, str(run), str(data), options)
    steps = sorted(int(path.stem[5:]) for path in (run / "forensics").iterdir())
    assert steps == [*range(3, 23), 32, 42]
