"""Runs of one seed start alike, bit for bit, and a sweep finds where they do not."""

import copy
import hashlib
import json

import pytest
import torch
from whole_runs import make_data, whole_run

from megaresid.errors import UserError
from megaresid.model.gpt import build, canonical_parameters
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS
from megaresid.sweeping.sharing import Sharing, read_initial

TREE = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "zero_optimization": {"stage": 1}}
VARIANTS = {"vanilla": 1, "hyper_connections(streams=2)": 1, "deep_norm": 1, "vanilla again": 2}


@pytest.fixture(scope="module")
def initials(ranks1, tmp_path_factory):
    """What real runs of one step said of their start, by variant; the last is of another seed."""
    folder = tmp_path_factory.mktemp("sharing")
    data = make_data(folder)
    found = {}
    for number, (variant, seed) in enumerate(VARIANTS.items()):
        options = {"residual": variant.removesuffix(" again"), "seed": seed, "run_dir": str(folder / f"run {number}")}
        options |= {"data": [str(data)], "steps": 1, "checkpoint_interval": 0}
        assert ranks1.run(whole_run, options, TREE) == ["finished"]
        found[variant] = read_initial(folder / f"run {number}")
    return found


def test_the_digests_are_those_of_a_model_that_is_built_anew(initials):
    shape = PRESETS["tiny"].model_copy(update={"layers": 2, "heads": 2, "width": 32, "context": 32})
    model = build(ModelPlan(shape, residual="hyper_connections(streams=2)"), seed=1)
    expected = {
        name: hashlib.sha256(bytes(parameter.detach().flatten().view(torch.uint8).tolist())).hexdigest()
        for name, parameter in canonical_parameters(model, model.prefixes).items()
        if not name.startswith("embed.tokens")  # large
    }
    said = initials["hyper_connections(streams=2)"]["parameters"]
    assert {name: said[name]["sha256"] for name in expected} == expected
    assert said.keys() - expected.keys() == {"embed.tokens.weight"}


def test_variants_of_one_seed_share_order_and_values_and_say_what_they_declare_otherwise(initials):
    sharing = Sharing()
    for variant, seed in VARIANTS.items():
        sharing.add(variant, variant, seed, initials[variant])
    vanilla, wide = initials["vanilla"]["parameters"], initials["hyper_connections(streams=2)"]["parameters"]
    assert all(wide[name] == start for name, start in vanilla.items()), "and only adds to them"
    assert sharing.declared.keys() == {"deep_norm"}, "which scales the start of the sublayers' matrices"
    assert initials["vanilla again"]["order"]["sha256"] != initials["vanilla"]["order"]["sha256"]
    name = "layers.00.mlp.fc.weight" if "layers.00.mlp.fc.weight" in vanilla else "embed.tokens.weight"
    assert initials["vanilla again"]["parameters"][name]["sha256"] != vanilla[name]["sha256"]


def test_a_planted_breach_is_told_with_run_and_parameter(initials):
    sharing = Sharing()
    sharing.add("first", "vanilla", 1, initials["vanilla"])
    planted = copy.deepcopy(initials["hyper_connections(streams=2)"])
    start = planted["parameters"]["layers.01.attention.o_proj.weight"]
    start["sha256"] = start["sha256"][::-1]
    with pytest.raises(UserError, match="run second starts parameter layers.01.attention.o_proj.weight .* than first"):
        sharing.add("second", "hyper", 1, planted)
    assert not sharing.has_seen("second")
    sharing.add("third", "hyper", 1, initials["hyper_connections(streams=2)"])


def test_what_only_two_later_runs_share_is_compared_too(initials):
    sharing, wide = Sharing(), initials["hyper_connections(streams=2)"]
    sharing.add("first", "vanilla", 1, initials["vanilla"])
    sharing.add("second", "hyper", 1, wide)
    planted = copy.deepcopy(wide)
    own = next(name for name in wide["parameters"] if name not in initials["vanilla"]["parameters"])
    planted["parameters"][own]["sha256"] = "0" * 64
    with pytest.raises(UserError, match=f"third starts parameter {own} from other values than second"):
        sharing.add("third", "hyper", 1, planted)


@pytest.mark.parametrize("key, value", [("data", "other"), ("sha256", "0" * 64), ("global_batch_size", 16)])
def test_another_order_of_data_is_told(initials, key, value):
    sharing = Sharing()
    sharing.add("first", "vanilla", 1, initials["vanilla"])
    planted = copy.deepcopy(initials["vanilla"])
    planted["order"][key] = value
    with pytest.raises(UserError, match=f"run second has another order of data than first, of the same seed: {key} is"):
        sharing.add("second", "vanilla", 1, planted)


def test_a_file_that_is_not_there_yet_and_a_damaged_one(tmp_path):
    assert read_initial(tmp_path) is None
    for text in ("{", "[]", json.dumps({"order": {}})):
        (tmp_path / "initial.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            read_initial(tmp_path)
