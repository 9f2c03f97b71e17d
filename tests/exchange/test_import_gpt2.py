"""GPT-2 weights in Hugging Face's form become a model of ours, or are refused by name."""

import json
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import megaresid
from megaresid.errors import UserError
from megaresid.exchange import gpt2_folder, write
from megaresid.exchange.gpt2_folder import GPT2Folder
from megaresid.import_gpt2 import import_gpt2
from megaresid.saved_run import open_saved

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 24, "n_positions": 20}
IDX = torch.randint(50257, (2, 20), generator=torch.Generator().manual_seed(4))


def their_model(**options) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**SIZES | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("published")
    their_model().save_pretrained(folder)
    return folder


@pytest.fixture
def source(published, tmp_path) -> Path:
    """Of ``published``, to be changed."""
    return Path(shutil.copytree(published, tmp_path / "source"))


def change(source: Path, **values) -> None:
    config = json.loads((source / "config.json").read_text()) | values
    (source / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def rewrite(source: Path, function) -> None:
    tensors = function(load_file(source / "model.safetensors"))
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def assert_imported(folder: Path, twin: GPT2LMHeadModel) -> None:
    model = megaresid.load(folder).double()
    assert (model(IDX)[0] - twin.double()(IDX).logits).abs().max() < 1e-10
    assert model.head.weight.shape == (50304, 24) and not model.head.weight[50257:].any()


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast"])
def test_the_model_is_transformers_own(tmp_path, activation, capsys):
    twin = their_model(activation_function=activation, layer_norm_epsilon=1e-3, resid_pdrop=0.3)
    twin.save_pretrained(tmp_path / "source")
    import_gpt2(str(tmp_path / "source"), tmp_path / "out")
    assert "check     logits equal to" in capsys.readouterr().out
    assert_imported(tmp_path / "out", twin)
    saved = open_saved(tmp_path / "out")
    assert (saved.plan.shape.norm_epsilon, saved.plan.shape.dropout, saved.step) == (1e-3, 0.0, 0)
    assert (saved.dtype, saved.data, saved.config) == (None, None, None)
    assert json.loads((tmp_path / "out" / "megaresid.json").read_text())["source"] == "source"


def bare(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_masks(tensors):
    """As the first files were, which have the causal mask too."""
    mask = torch.ones(20, 20).tril().view(1, 1, 20, 20)
    masks = {f"h.{layer}.attn.bias": mask for layer in range(2)}
    return bare(tensors) | masks | {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}


def with_head(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


@pytest.mark.parametrize("form", [bare, with_masks, with_head])
def test_names_may_be_those_of_any_version(source, tmp_path, form):
    twin = GPT2LMHeadModel.from_pretrained(source)
    rewrite(source, form)
    import_gpt2(str(source), tmp_path / "out")
    assert_imported(tmp_path / "out", twin.eval())


def test_half_precision_is_widened_exactly(source, tmp_path):
    rewrite(source, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    import_gpt2(str(source), tmp_path / "out")
    assert_imported(tmp_path / "out", GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32).eval())


def test_several_files_are_one_model(published, tmp_path):
    twin = GPT2LMHeadModel.from_pretrained(published).eval()
    twin.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    assert not (tmp_path / "source" / "model.safetensors").exists()
    import_gpt2(str(tmp_path / "source"), tmp_path / "out")
    assert_imported(tmp_path / "out", twin)


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_published_shapes_are_our_presets(preset, monkeypatch, tmp_path):
    from megaresid.exchange.gpt2_config import config_of, shape_of
    from megaresid.model.presets import PRESETS

    shape = PRESETS[preset]
    assert shape_of(config_of(shape), "config.json") == shape
    theirs = GPT2Config(n_layer=shape.layers, n_head=shape.heads, n_embd=shape.width)
    assert shape_of(theirs.to_dict(), "config.json") == shape.model_copy(update={"dropout": 0.1})
    with torch.device("meta"):
        wanted = {name: list(p.shape) for name, p in GPT2LMHeadModel(theirs).named_parameters()}
    pairs = gpt2_folder.pairs(shape)
    assert {"transformer." + pair.theirs: list(pair.shape) for pair in pairs} == wanted


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"n_inner": 50}, "n_inner=50"),
        ({"vocab_size": 50304}, "vocab_size=50304: .*50257"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"n_layer": "absent"}, "n_layer=None"),
        ({"n_head": 5}, "n_head=5"),
        ({"n_layer": 3}, "h.2.ln_1.weight is missing"),
        ({"n_layer": 1}, "it has h.1.attn.c_attn.bias, which a GPT-2 has not"),
        ({"n_positions": 10}, r"wpe.weight has shape \[20, 24\], and by config.json \[10, 24\]"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon='small'"),
    ],
)
def test_what_is_not_a_gpt2_of_ours_is_named(source, tmp_path, values, reason):
    change(source, **values)
    with pytest.raises(UserError, match=reason) as raised:
        import_gpt2(str(source), tmp_path / "out")
    assert str(source) in str(raised.value) and os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    "form, reason",
    [
        (lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}, "lm_head.weight is not wte.weight"),
        (lambda t: t | {"transformer.h.0.adapter": torch.ones(2)}, "it has h.0.adapter"),
        (lambda t: {n: v for n, v in t.items() if n != "transformer.ln_f.bias"}, "ln_f.bias is missing"),
    ],
)
def test_weights_that_are_not_a_gpt2s_are_named(source, tmp_path, form, reason):
    rewrite(source, form)
    with pytest.raises(UserError, match=reason):
        import_gpt2(str(source), tmp_path / "out")


def test_pickles_are_refused(source, tmp_path):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles.*safetensors"):
        import_gpt2(str(source), tmp_path / "out")


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_missing_or_damaged_configuration_is_named(source, tmp_path, content):
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json: "):
        import_gpt2(str(source), tmp_path / "out")


def test_a_model_read_wrongly_is_not_kept(source, tmp_path, monkeypatch):
    original = gpt2_folder.from_gpt2

    def swapped(shape, pair, tensor):
        found = list(original(shape, pair, tensor))
        names = [name for name, _ in found]
        return zip(names, [tensor for _, tensor in reversed(found)])

    monkeypatch.setattr(gpt2_folder, "from_gpt2", swapped)
    with pytest.raises(UserError, match="failed the check: its logits differ by up to"):
        import_gpt2(str(source), tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_megaresid_tells_whose_form_it_is(source):
    with pytest.raises(UserError, match="Hugging Face's form: .*import_gpt2"):
        megaresid.load(source)


def in_the_hubs_cache(cache: Path, repository: str, folder: Path) -> None:
    """As the Hub's library keeps a download: a revision's name, and the files under its commit."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("c0ffee")
    shutil.copytree(folder, place / "snapshots" / "c0ffee")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The only place where the Hub's library looks: nothing reaches the network."""
    whole, place = huggingface_hub.snapshot_download, tmp_path / "cache"

    def offline(*given, **named):
        return whole(*given, cache_dir=place, **named)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    return place


def test_a_name_is_looked_for_in_the_hubs_cache_and_told(published, cache, tmp_path, capsys):
    in_the_hubs_cache(cache, "openai-community/gpt2", published)
    import_gpt2("gpt2", tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "source    the Hub's openai-community/gpt2, downloaded where it is not cached"
    assert said[1] == "revision  c0ffee"
    assert open_saved(tmp_path / "out").plan.hash == GPT2Folder(published, "x").plan.hash
    assert json.loads((tmp_path / "out" / "megaresid.json").read_text())["source"] == "openai-community/gpt2 at c0ffee"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("gpt2", "the Hub cannot be reached: give a folder"),
        ("someone/gpt2", "the Hub cannot be reached: give a folder"),
        ("no/such/folder", "neither a folder nor a name on the Hub"),
    ],
)
def test_a_name_that_is_nowhere_is_one_message(cache, tmp_path, name, reason):
    with pytest.raises(UserError, match=f"--from {name}: .*{reason}"):
        import_gpt2(name, tmp_path / "out")


def test_without_transformers_it_says_what_to_install(published, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'megaresid\[eval\]'"):
        write.write_imported(str(published), tmp_path / "out", say=lambda line: None)
