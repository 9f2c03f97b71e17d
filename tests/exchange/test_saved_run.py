"""What is read back of a run directory, and what of another version is refused."""

import json
import re

import pytest
import torch
from made_runs import DATA, configuration, made_run, model_of, same_parameters

import megaresid
from megaresid.errors import UserError
from megaresid.saved_run import load_model, open_saved
from megaresid.training.run_dir import write_json


@pytest.fixture
def run(tmp_path):
    made_run(tmp_path / "first")
    return tmp_path / "first"


def test_a_run_and_its_checkpoint_are_the_model_that_was_saved(run):
    saved = open_saved(run)
    assert (saved.step, saved.folder, saved.weights.name) == (3, run.resolve(), "step_00000003")
    assert saved.dtype is None and saved.data == DATA and saved.config == configuration()
    expected = model_of(configuration())
    for path in (run, run / "checkpoints", saved.weights, str(run)):
        model = megaresid.load(path)
        assert same_parameters(model, expected) and not model.training


def test_one_parameter_may_be_asked_for(run):
    model = model_of(configuration())
    ((name, tensor),) = open_saved(run).parameters(["layers.01.mlp.fc.bias"])
    assert name == "layers.01.mlp.fc.bias" and torch.equal(tensor, model.parts[3].mlp.fc.bias)


@pytest.mark.parametrize(
    "sections, dtype",
    [
        ({}, None),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, torch.bfloat16),
        ({"torch_autocast": {"enabled": False}}, None),
        ({"bf16": {"enabled": True}}, torch.bfloat16),
    ],
)
def test_the_dtype_is_that_of_the_runs_products(run, sections, dtype):
    write_json(run / "ds_config.json", {"schema": 1, **sections})
    assert open_saved(run).dtype == dtype


def test_what_depends_on_the_step_is_at_the_checkpoints(tmp_path):
    config = configuration(residual="pro_res")
    expected = made_run(tmp_path / "run", config, step=500)
    idx = torch.arange(12)[None]
    logits = expected(idx)[0]
    assert torch.equal(load_model(tmp_path / "run")(idx)[0], logits)
    assert not torch.equal(model_of(config, step=0)(idx)[0], logits)


def change(run, name, **values):
    tree = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps({k: v for k, v in (tree | values).items() if v is not None}))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"schema": 2}, "its schema is 2, and this version of megaresid reads 1"),
        ({"schema": None}, "its schema is None"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"layers": "two"}, "layers='two' is not valid"),
        ({"residual": "vanila"}, "unknown residual 'vanila'.*'vanilla'"),
        ({"attention": "mine:Mixer"}, "cannot import attention 'mine:Mixer'.*PYTHONPATH"),
        ({"model": "gigantic"}, "gigantic"),
        ({"width": 15}, "width 15 is not divisible"),
        ({"activation": "gelu"}, "not the one that was saved"),
        ({"model_type": "gpt2"}, "Hugging Face's form: .*import_gpt2"),
    ],
)
def test_a_configuration_of_another_version_is_one_message(run, values, message):
    change(run, "config.json", **values)
    with pytest.raises(UserError, match=message) as raised:
        open_saved(run)
    assert str(run) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_damaged_configuration_is_named(run, text):
    (run / "config.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(run / "config.json"))):
        open_saved(run)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": 3}, "it lacks parameter layers.02"),
        ({"layers": 1}, "it has parameter layers.01"),
        ({"context": 13}, r"embed.positions.weight has shape \[12, 16\] there and \[13, 16\] here"),
    ],
)
def test_parameters_that_do_not_fit_are_named(tmp_path, options, message):
    """Of a checkpoint that does not say what its spec was."""
    made_run(tmp_path / "run", identity={})
    change(tmp_path / "run", "config.json", **options)
    with pytest.raises(UserError, match=f"step_00000003: {message}"):
        open_saved(tmp_path / "run")


def test_a_run_without_a_checkpoint_and_a_place_without_a_run_are_named(run, tmp_path):
    (run / "checkpoints" / "step_00000003" / "complete.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        open_saved(run)
    for nothing in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="neither a run directory"):
            open_saved(nothing)
