"""Models taken out of runs: what is written is the model, or nothing is."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import made_runs
import pytest
import torch
from made_runs import DATA, configuration, made_run, same_parameters
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_models import move_away
from transformers import AutoModelForCausalLM, AutoTokenizer

import megaresid
from megaresid import export as command
from megaresid.errors import UserError
from megaresid.exchange import weights, write
from megaresid.export import export
from megaresid.saved_run import open_saved

CONTEXT = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Its checkpoint holds ``made``."""
    folder = tmp_path_factory.mktemp("runs")
    made_run(folder / "first")
    return folder / "first"


@pytest.fixture(scope="module")
def made(run):
    return open_saved(run).model()


@pytest.fixture(scope="module")
def exported(run) -> Path:
    export(run, "safetensors", run.parent / "exported")
    return run.parent / "exported"


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """Of ``exported``, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_folder_is_the_model_in_one_line(exported, made):
    model = megaresid.load(str(exported))
    assert same_parameters(model, made) and not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_folder_describes_itself(exported, made):
    told = json.loads((exported / "megaresid.json").read_text())
    assert (told["format"], told["schema_version"], told["megaresid"]) == ("megaresid model", 1, megaresid.__version__)
    assert (told["source"], told["step"], told["data"]) == ("first/step_00000003", 3, DATA)
    assert (told["dtype"], told["products"], told["modules"]) == ("float32", "float32", [])
    assert told["spec"] == made.plan.tree() and told["spec_sha256"] == made.plan.hash
    stored = load_file(exported / "model.safetensors")
    assert told["parameters"] == {name: list(tensor.shape) for name, tensor in stored.items()}
    content = (exported / "model.safetensors").read_bytes()
    assert told["files"] == {
        "model.safetensors": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    }
    assert sorted(os.listdir(exported)) == ["megaresid.json", "model.safetensors"]


def test_an_exported_folder_exports_again_to_the_same_bytes(exported, tmp_path):
    export(exported, "safetensors", tmp_path / "again")
    again, first = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "again", exported))
    assert again == first
    saved = open_saved(tmp_path / "again")
    assert (saved.step, saved.data, saved.config, saved.folder) == (3, DATA, None, tmp_path / "again")
    assert saved.source == "first/step_00000003"


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_hugging_face_loads_a_vanilla_model_and_its_tokenizer(tmp_path, capsys, activation):
    model = made_run(tmp_path / "run", configuration(activation=activation, dropout=0.1))
    export(tmp_path / "run", "hf", tmp_path / "hf")
    assert "check     logits equal to" in capsys.readouterr().out
    twin, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float64, local_files_only=True, output_loading_info=True
    )
    assert not any(report.values())
    assert type(twin).__name__ == "GPT2LMHeadModel" and twin.lm_head.weight is twin.transformer.wte.weight
    assert twin.transformer.wte.weight.shape == (50257, 16)
    assert (twin.config.resid_pdrop, twin.config.n_positions, twin.config.eos_token_id) == (0.1, CONTEXT, 50256)
    idx = torch.randint(50257, (3, CONTEXT), generator=torch.Generator().manual_seed(5))
    assert (twin.eval()(idx).logits - model.double()(idx)[0]).abs().max() < 1e-10
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert tokenizer("Hello, world!")["input_ids"] == [15496, 11, 995, 0]
    assert tokenizer.model_max_length == CONTEXT
    ids = twin.generate(torch.tensor([[15496]]), max_new_tokens=2, do_sample=False, pad_token_id=50256)
    assert ids.shape == (1, 3)


def test_rounding_that_a_model_magnifies_is_told_from_a_mistake(tmp_path, monkeypatch, capsys):
    """The last norm's weights make the logits, and what they are rounded by, as large as one likes."""
    monkeypatch.setattr(made_runs, "move_away", lambda parameters, away, rows: magnified(parameters, rows))
    made_run(tmp_path / "run")
    export(tmp_path / "run", "hf", tmp_path / "hf")
    told = re.search(r"logits equal to (\S+), which is rounding: to (\S+) in fp64", capsys.readouterr().out)
    in_fp32, in_fp64 = map(float, told.groups())
    assert in_fp32 > 1e-4 and in_fp64 < 1e-8
    assert (tmp_path / "hf" / "config.json").exists()


@torch.no_grad()
def magnified(parameters, rows):
    move_away(parameters, 0.2, rows)
    parameters["head.norm.weight"] *= 1000


@pytest.mark.parametrize("format", ["hf", "safetensors"])
def test_large_models_are_several_files(run, made, tmp_path, monkeypatch, format):
    monkeypatch.setattr(weights.write_weights, "__defaults__", (5000,))
    export(run, format, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    if format == "safetensors":
        assert same_parameters(megaresid.load(tmp_path / "out"), made)
        return
    idx = torch.arange(CONTEXT)[None]
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert (twin(idx).logits - made(idx)[0]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"residual": "hyper_connections"}, "residual 'hyper_connections' of layer 0 is not GPT-2's, 'vanilla'"),
        ({"attention": "softmax + delta_net"}, "attention 'delta_net' of layer 1 is not GPT-2's, 'softmax'"),
        ({"attention": "softmax(window=4)"}, "attention 'softmax' of layer 0 has window=4, and GPT-2's is window=None"),
        ({"attention": "softmax(bias=false)"}, "has bias=False"),
        ({"positions": "none"}, "no learned positions"),
        ({"separate_documents": True}, "keeps documents apart"),
    ],
)
def test_what_a_gpt2_cannot_hold_is_named(tmp_path, options, reason):
    made_run(tmp_path / "run", configuration(**options), ranks=1)
    with pytest.raises(UserError, match=reason) as raised:
        export(tmp_path / "run", "hf", tmp_path / "out")
    assert "--format safetensors" in str(raised.value)
    assert os.listdir(tmp_path) == ["run"]


def test_nothing_is_overwritten(run, tmp_path):
    for format in ("hf", "safetensors"):
        with pytest.raises(UserError, match="--out .*there already"):
            export(run, format, tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="there already"):
        export(run, "hf", tmp_path / "dangling")


@pytest.mark.parametrize("format, change", [("safetensors", 1e-6), ("hf", 0.5), ("hf", float("nan"))])
def test_a_failed_check_leaves_nothing_and_says_by_how_much(run, tmp_path, monkeypatch, capsys, format, change):
    def spoilt(tensors, path, *args):
        name = next(name for name in tensors if name.endswith(("head.norm.bias", "ln_f.bias")))
        save_file(tensors | {name: tensors[name] + change}, path, *args)

    monkeypatch.setattr(weights, "save_file", spoilt)
    monkeypatch.setattr(sys, "argv", ["export", "--run", str(run), "--format", format, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2 and os.listdir(tmp_path) == []
    told = capsys.readouterr()
    assert "done" not in told.out
    (line,) = told.err.splitlines()
    largest = float(line.partition("differ by up to ")[2].split()[0])
    if format == "safetensors":
        assert 0 < largest < 1e-4
    else:  # the change of the last bias goes through the head: at most the sum of a row
        assert largest > 0.01 and (largest == float("inf")) == (change != change)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: File too large")]
)
def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch, error):
    def full(tensors, path, *args):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(UserError, match="--out .* cannot be written: (No space left|I/O error)"):
        export(run, "safetensors", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_comes_to_be_meanwhile_is_kept(run, tmp_path, monkeypatch):
    def with_other(saved, folder, say):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        original(saved, folder, say)

    original = write.write_folder
    monkeypatch.setattr(write, "write_folder", with_other)
    with pytest.raises(UserError, match="there already"):
        export(run, "safetensors", tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["theirs"]


@pytest.mark.parametrize("change", [0.0, 1e-6])
def test_without_the_gpu_that_a_mixer_needs_parameters_are_compared(run, made, tmp_path, monkeypatch, capsys, change):
    def spoilt(tensors, path, *args):
        save_file({name: tensor + change for name, tensor in tensors.items()}, path, *args)

    monkeypatch.setattr(write, "runs_here", lambda plan: False)
    monkeypatch.setattr(weights, "save_file", spoilt)
    if change:
        with pytest.raises(UserError, match=r"failed the check: its \S+ differs by up to 1\S*e-06"):
            export(run, "safetensors", tmp_path / "out")
        assert os.listdir(tmp_path) == []
        return
    export(run, "safetensors", tmp_path / "out")
    assert "check     parameters equal bit for bit; a mixer needs a GPU" in capsys.readouterr().out
    assert same_parameters(megaresid.load(tmp_path / "out"), made)


def flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def described(**changes):
    def damage(folder: Path) -> None:
        tree = json.loads((folder / "megaresid.json").read_text()) | changes
        (folder / "megaresid.json").write_text(json.dumps(tree))

    return damage


@pytest.mark.parametrize(
    "damage, reason",
    [
        (flip, "model.safetensors: its bytes are not those"),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "model.safetensors: cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights in it"),
        (lambda folder: (folder / "megaresid.json").write_text("{"), "megaresid.json: cannot be read"),
        (lambda folder: (folder / "megaresid.json").write_text("[]"), "megaresid.json: "),
        (described(schema_version=2, megaresid="9.0"), r"schema_version 2, .* reads 1: .*\(9.0\)"),
        (described(colour="red"), "megaresid.json: colour: "),
        (described(step="many"), "megaresid.json: step: "),
        (described(residual="new_variant"), "unknown residual 'new_variant'"),
        (described(residual="rezero"), "makes another model of its layer specs: use megaresid"),
        (described(spec={}), "its spec is not of this version"),
        (described(parameters={}), "its weights are not those that megaresid.json lists"),
        (described(files={"../x": {"bytes": 1, "sha256": ""}}), "'../x' is not the name of a file"),
        (described(files={"other": {"bytes": 1, "sha256": ""}}), "other: the file is missing"),
    ],
)
def test_a_damaged_folder_is_one_message(copy, damage, reason):
    damage(copy)
    with pytest.raises(UserError, match=reason) as raised:
        megaresid.load(copy)
    assert str(copy) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_beside_the_model_is_no_matter(copy, made):
    (copy / "notes.txt").write_text("good")
    assert same_parameters(megaresid.load(copy), made)


USERS = """
import torch
from megaresid.residual.vanilla import Vanilla

class Mine(Vanilla):
    citation = "me"
"""


def test_a_users_variant_is_named_and_needed(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "users_export.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path / "code")
    model = made_run(tmp_path / "run", configuration(residual="users_export:Mine"))
    export(tmp_path / "run", "safetensors", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "megaresid.json").read_text())["modules"] == ["users_export:Mine"]
    assert megaresid.load(tmp_path / "out").plan.hash == model.plan.hash
    monkeypatch.undo()
    sys.modules.pop("users_export")
    with pytest.raises(UserError, match="cannot import residual 'users_export:Mine'.*PYTHONPATH") as raised:
        megaresid.load(tmp_path / "out")
    assert str(tmp_path / "out") in str(raised.value)


def test_the_package_itself_is_light():
    said = "import sys, megaresid; megaresid.load; print('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True).stdout == "False\n"
