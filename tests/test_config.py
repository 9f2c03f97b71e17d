"""The run configuration: presets, files, the command line, and mistakes in each."""

import json
from pathlib import Path

import pytest

from megaresid.config import REFERENCE, SECTIONS, RunConfig, from_flat, parse
from megaresid.errors import UserError

NEEDED = ["--data", "d", "--run-dir", "r", "--deepspeed_config", "ds.json"]


def test_every_key_has_one_name_in_the_whole_tree():
    fields = [key for field in RunConfig.model_fields.values() for key in field.annotation.model_fields]
    assert len(fields) == len(set(fields)) == len(SECTIONS)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"steps": 77, "learning-rate": 1e-2, "betas": [0.8, 0.9]}))
    config = parse([*NEEDED, "--preset", "mlsbench-345m", "--config", str(path), "--learning-rate", "0.5"])
    assert config.optimizer.learning_rate == 0.5
    assert config.run.steps == 77 and config.optimizer.betas == (0.8, 0.9)
    assert config.run.seed == 42 and config.batch.global_batch_size == REFERENCE["global_batch_size"]


def test_a_saved_configuration_reads_back_as_the_same(tmp_path):
    config = parse([*NEEDED, "--model", "tiny", "--betas", "0.7", "0.8", "--no-compile", "--init-from", "x", "--parameter-rules", "a:b", "c"])
    assert config.optimizer.parameter_rules == ("a:b", "c")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"schema": 1, **config.flat()}))
    assert parse(["--config", str(path)]) == config
    assert from_flat(config.flat(), "x") == config


def test_data_is_one_folder_or_several_with_weights(tmp_path):
    one = parse(NEEDED)
    assert one.run.data == (Path("d"),) and one.run.data_weights == () and one.run.data_order == "shuffled"
    several = parse(["--data", "a b", "c", *NEEDED[2:], "--data-weights", "0.7", "3", "--data-order", "sequential"])
    assert several.run.data == (Path("a b"), Path("c")) and several.run.data_weights == (0.7, 3.0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(several.flat()))
    assert parse(["--config", str(path)]) == several
    assert parse(["--config", str(path), "--data", "e", "--data-weights", "1"]).run.data == (Path("e"),)


def test_a_configuration_of_before_several_folders_could_be_named_still_reads(tmp_path):
    flat = parse(NEEDED).flat()
    for key in ("data_weights", "data_order", "align_documents"):
        del flat[key]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"schema": 1, **flat, "data": "d"}))
    assert parse(["--config", str(path)]) == parse(NEEDED) == from_flat(flat | {"data": "d"}, "x")
    assert from_flat({"data": None}, "x").run.data == ()


@pytest.mark.parametrize("interval, chosen", [(250, "validation@250"), (0, "")])
def test_a_configuration_of_before_evaluations_were_chosen_still_reads(tmp_path, interval, chosen):
    flat = parse(NEEDED).flat()
    for key in ("eval", "eval_data", "eval_strict"):
        del flat[key]
    old = flat | {"validation_interval": interval}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"schema": 1, **old}))
    assert parse(["--config", str(path)]) == parse([*NEEDED, "--eval", chosen]) == from_flat(old, "x")
    assert "validation_interval" in old
    assert parse(["--config", str(path), "--eval", "piqa@end"]).evaluation.eval == "piqa@end"


def test_evaluations_are_chosen_in_one_text():
    config = parse([*NEEDED, "--eval", "validation@5 my:own@end", "--eval-data", "a b", "--eval-strict"])
    assert config.evaluation.eval == "validation@5 my:own@end"
    assert config.evaluation.eval_data == Path("a b") and config.evaluation.eval_strict
    assert parse([*NEEDED, "--eval", ""]).evaluation.eval == ""


def test_the_launchers_own_argument_and_both_spellings_are_taken():
    assert parse(["--local_rank=1", *NEEDED, "--global_batch_size", "4"]).batch.global_batch_size == 4


def test_the_reference_run_is_the_published_one():
    """13,535 steps of 512 x 1024 tokens, 3e-4 to 3e-5 by cosine, warm-up 2%, decay 0.1, betas 0.9 and 0.95, clip 1."""
    config = parse([*NEEDED, "--preset", "reference"])
    assert config.run.steps * config.batch.global_batch_size * config.shape.context == 13_535 * 524_288
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.schedule) == (3e-4, 3e-5, "cosine")
    assert (optimizer.warmup_fraction, optimizer.weight_decay, optimizer.clip) == (0.02, 0.1, 1.0)
    assert optimizer.betas == (0.9, 0.95) and config.evaluation.eval == "validation@1000"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stpes", "3"], "unknown option --stpes: did you mean 'steps'"),
        (["--preset", "mlsbench"], "--preset mlsbench: did you mean 'mlsbench-345m'"),
        (["--model", "gpt2-medum"], "--model gpt2-medum: did you mean 'gpt2-medium'"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--learning-rate", "nan"], "--learning-rate nan: must be at least 0"),
        (["--dropout", "1.5"], "--dropout 1.5: must be between 0 and 1"),
        (["--betas", "0.9", "1.0"], "--betas .* below 1"),
        (["--min-learning-rate", "1"], "--min-learning-rate 1.0 is above --learning-rate 0.0003"),
        (["--resume", "y", "--init-from", "x"], "exclude each other"),
        (["--config", "missing.json"], "--config missing.json: No such file"),
        (["--config"], "--config needs a value"),
        (["--data", "e"], "--data is given twice: give all folders to one"),
        (["--data=e"], "--data is given twice: give all folders to one"),
        (["--eval", "validation"], "--eval validation: it does not say when"),
        (["--eval", "validation@5", "piqa@end"], "unknown argument piqa@end: give all entries of --eval in one pair"),
        (["--eval", "validation@5", "--eval=piqa@end"], "--eval is given twice: give all entries to one"),
        (["--validation-interval", "5"], 'unknown option --validation-interval: it is now --eval "validation@STEPS"'),
        (["--data-weights", "1", "--data_weights", "2"], "--data-weights is given twice: give all weights to one"),
    ],
)
def test_mistakes_name_the_value_and_the_mend(arguments, message):
    with pytest.raises(UserError, match=message):
        parse([*NEEDED, *arguments])


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"lerning_rate": 1}', "unknown key 'lerning_rate': did you mean 'learning_rate'"),
        ('{"steps": "many"}', "steps='many' is not valid"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        parse([*NEEDED, "--config", str(path)])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("missing", ["data", "run-dir", "deepspeed_config"])
def test_what_is_missing_is_named(missing):
    at = NEEDED.index(f"--{missing}")
    with pytest.raises(UserError, match=missing.replace("_", "-")):
        parse(NEEDED[:at] + NEEDED[at + 2 :])
