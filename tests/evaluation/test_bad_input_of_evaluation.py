"""A run or a model that cannot be read: every command that reads one says so in one line, with exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import configuration, made_run

from megaresid import evaluate, export, generate

COMMANDS = {
    "generate": (generate.main, ["--prompt", "x", "--tokens", "1"]),
    "evaluate": (evaluate.main, ["--tasks", "validation"]),
    "export": (export.main, ["--format", "safetensors", "--out", "exported"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("made") / "run"
    made_run(run)
    return run


def configured(run: Path, change: Callable[[dict], None]) -> None:
    tree = json.loads((run / "config.json").read_text())
    change(tree)
    (run / "config.json").write_text(json.dumps(tree))


def without_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def half_written(run: Path) -> None:
    next(run.rglob("complete.json")).unlink()


def of_another_schema(run: Path) -> None:
    configured(run, lambda tree: tree.update(schema=7))


def with_an_unknown_key(run: Path) -> None:
    configured(run, lambda tree: tree.update(lerning_rate=1.0))


def with_an_unknown_variant(run: Path) -> None:
    configured(run, lambda tree: tree.update(residual="vanila"))


def of_another_model(run: Path) -> None:
    configured(run, lambda tree: tree.update(residual="rezero"))


def of_another_shape(run: Path) -> None:
    configured(run, lambda tree: tree.update(width=32))


def with_half_a_configuration(run: Path) -> None:
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text[: len(text) // 2])


def with_a_list_for_a_configuration(run: Path) -> None:
    (run / "config.json").write_text("[]")


def gone(run: Path) -> None:
    shutil.rmtree(run)


DAMAGE = {
    gone: "neither a run directory, nor a checkpoint in one, nor an exported model",
    without_checkpoints: "there is no complete checkpoint yet",
    half_written: "there is no complete checkpoint yet",
    of_another_schema: "its schema is 7, and this version of megaresid reads 1",
    with_an_unknown_key: "did you mean 'learning_rate'",
    with_an_unknown_variant: "did you mean 'vanilla'",
    of_another_model: "its model is not the one that was saved",
    of_another_shape: "its model is not the one that was saved",
    with_half_a_configuration: "config.json is damaged",
    with_a_list_for_a_configuration: "config.json is damaged",
}


def failure(command: str, run: Path, capsys, monkeypatch) -> str:
    """Run the command beside the run; check that it exits with 2, says one line and writes nothing. The line."""
    main, options = COMMANDS[command]
    monkeypatch.chdir(run.parent)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the command sets it for its own process, which here is the test's
    monkeypatch.setattr("sys.argv", [command, "--run", str(run), *options])
    before = contents(run.parent)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert contents(run.parent) == before
    return said.err


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_run_that_cannot_be_read(made, tmp_path, capsys, monkeypatch, command, damage):
    run = shutil.copytree(made, tmp_path / "run")
    damage(run)
    assert DAMAGE[damage] in failure(command, run, capsys, monkeypatch)


@pytest.mark.parametrize("command", ["generate", "export"])
def test_weights_that_are_not_what_was_saved(made, tmp_path, capsys, monkeypatch, command):
    run = shutil.copytree(made, tmp_path / "run")
    weights = next(run.rglob("rank_00001.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = failure(command, run, capsys, monkeypatch)
    assert "rank_00001.safetensors" in said


def test_a_model_of_hugging_faces_is_told_apart(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"model_type": "gpt2"}')
    for command in COMMANDS:
        assert "python -m megaresid.import_gpt2" in failure(command, run, capsys, monkeypatch)


def test_a_users_variant_whose_module_is_not_there(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    made_run(run, configuration())
    configured(run, lambda tree: tree.update(attention="module_of_somebody:Mixer"))
    for command in COMMANDS:
        assert "module_of_somebody" in failure(command, run, capsys, monkeypatch)
