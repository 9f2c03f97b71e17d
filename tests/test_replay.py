"""A bad step of a real run, repeated from what was kept of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bad_runs import OVERFLOWS, Overflowing, carry_out, small_vocabulary, write_data

from megaresid.errors import UserError
from megaresid.replay import main
from megaresid.training.repeat import open_step, repeat

BAD = 22


def _run(run, data, stage, options):
    return carry_out(run, data, stage, **options)


def _overflow(run, data, stage):
    return carry_out(run, data, stage, Overflowing, max_bad_steps=2, checkpoint_interval=2)


def _repeated(run: str, step: int | None):
    """Runs on one rank."""
    with small_vocabulary():
        found = repeat(open_step(Path(run), step))
    return found, "\n".join(found.lines())


def kept(run: Path, step: int) -> dict:
    return json.loads((run / "forensics" / f"step_{step:08d}.json").read_text())


@pytest.mark.parametrize(
    "ranks, stage",
    [(1, 1), (2, 2), *(pytest.param(*case, marks=pytest.mark.full) for case in [(1, 0), (1, 3), (2, 3)])],
)
def test_a_bad_batch_is_repeated_with_dropout_and_named(ranks, stage, request, ranks1, tmp_path):
    """Three steps behind a checkpoint; bit for bit where the run was one rank, else to 1e-6."""
    data, run = write_data(tmp_path / "data", bad={BAD}), tmp_path / "run"
    pool = request.getfixturevalue(f"ranks{ranks}")
    assert pool.run(_run, str(run), str(data), stage, {"dropout": 0.1})[0][0] == "FINISHED"
    tree = kept(run, BAD + 1)
    (found, text), = ranks1.run(_repeated, str(run), None)
    assert found.bad.start.name == "step_00000020"
    assert found.reproduced and (found.difference == 0 or ranks == 2), text
    assert found.loss == pytest.approx(tree["loss"], rel=1e-6)
    assert found.gradient_norm == pytest.approx(tree["gradient_norm"], rel=1e-5)
    assert found.first_not_finite is None
    samples = range(8 * BAD, 8 * BAD + 8)
    assert {sample for _, sample, _ in found.worst} <= set(samples)
    assert f"train_000000.bin from token {24 * found.worst[0][1]} on" in text
    for layer, pair in tree["layers"].items():
        assert f"{layer} " in text and f"{pair['gradient_norm']:12.6g}" in text


def test_an_overflow_is_named_by_the_module_where_it_arises(ranks2, ranks1, tmp_path):
    data, run = write_data(tmp_path / "data"), tmp_path / "run"
    ranks2.run(_overflow, str(run), str(data), 2)
    for step in (3, 4):
        (found, text), = ranks1.run(_repeated, str(run), step)
        assert found.reproduced and found.bad.start.name == "step_00000002", text
        assert "the output of layers.01.mlp.fc," in found.first_not_finite
        assert found.norms[OVERFLOWS][0] > 1e36
        assert "reproduced bit for bit" in text  # a loss that is not a number on both sides
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    ranks1.run(_repeated, str(run), 3)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}, "the run was touched"


def test_what_is_not_the_same_is_told(ranks1, tmp_path):
    """Another loss than the one kept, and other data than the run's."""
    data, run = write_data(tmp_path / "data", bad={BAD}), tmp_path / "run"
    ranks1.run(_run, str(run), str(data), 0, {})
    path = run / "forensics" / f"step_{BAD + 1:08d}.json"
    tree = json.loads(path.read_text())
    tree["ranks"][0]["losses"][1] *= 1.001
    path.write_text(json.dumps(tree))
    (found, text), = ranks1.run(_repeated, str(run), None)
    assert not found.reproduced and "NOT reproduced: losses differ by 1.0e-03" in text
    other = write_data(tmp_path / "other", bad={BAD, 3})
    with small_vocabulary(), pytest.raises(UserError, match="it is not the data of"):
        open_step(run, None, (other,))
    with pytest.raises(UserError, match="--step 7: nothing was kept of it; kept are"), small_vocabulary():
        open_step(run, 7)
    path.write_text("[]")
    with pytest.raises(UserError, match="not of this version"), small_vocabulary():
        open_step(run, None)


def test_mistakes_of_the_command_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--run", str(tmp_path / "nowhere")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nowhere" in error


def test_help_needs_no_torch():
    code = "import sys; from megaresid.replay import main\n"
    code += "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0 and "--step" in told.stdout, told.stderr
