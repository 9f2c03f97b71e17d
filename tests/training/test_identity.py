"""A resume with another data set, tokenizer, model or batch is refused, unless exactly that is allowed."""

import json
import shutil
from pathlib import Path

import pytest
from made_runs import SIZES, made_run

from data_prep.__main__ import main as data_prep
from megaresid.config import from_flat, parse
from megaresid.errors import UserError
from megaresid.training.identity import MEANING, Change, check_resumed, describe
from megaresid.training.prepare import prepare

MINE = {
    "data": "d" * 64,
    "tokenizer": "e" * 64,
    "spec": "f" * 64,
    "global_batch_size": 8,
    "seed": 42,
    "optimizer": "AdamW",
}
OTHERS = {
    "data": "1" * 64,
    "tokenizer": "2" * 64,
    "spec": "3" * 64,
    "global_batch_size": 16,
    "seed": 7,
    "optimizer": "Adam",
}
CHECKPOINT = Path("elsewhere/checkpoints/step_00000005")


def resumed(saved: dict, allowed: str = "", misfit: str | None = None, path: Path = CHECKPOINT) -> list[Change]:
    config = from_flat({"allow_other": allowed, "resume": "auto", "residual": "layer_scale"}, "test")
    return check_resumed(path, saved=saved, mine=MINE, step=5, config=config, misfit=misfit)


def refused(saved: dict, **how) -> str:
    with pytest.raises(UserError) as caught:
        resumed(saved, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_run_goes_on_and_nothing_is_recorded():
    assert resumed(dict(MINE)) == []
    assert resumed(dict(MINE), allowed=",".join(MEANING)) == []


def test_a_checkpoint_from_before_tokenizers_were_recorded_goes_on():
    assert resumed({key: value for key, value in MINE.items() if key != "tokenizer"}) == []


@pytest.mark.parametrize("key", OTHERS)
def test_each_key_is_refused_with_both_values_and_allowed_by_its_own_name_alone(key):
    saved = MINE | {key: OTHERS[key]}
    said = refused(saved)
    for value in (OTHERS[key], MINE[key]):
        assert str(value)[:12] in said
    assert f"--allow-other {key}" in said and "--init-from" in said
    others = ",".join(other for other in OTHERS if other != key)
    assert refused(saved, allowed=others) == said
    change = Change(step=5, key=key, was=OTHERS[key], now=MINE[key])
    assert resumed(saved, allowed=key) == [change]
    assert resumed(saved, allowed=f"{others}, {key}") == [change]
    line = describe(change)
    assert str(OTHERS[key])[:12] in line and str(MINE[key])[:12] in line and "step 5" in line


def test_a_value_that_the_checkpoint_lacks_is_another():
    assert "its seed is None, this run's is 42" in refused({k: v for k, v in MINE.items() if k != "seed"})


def test_all_differences_are_told_at_once():
    said = refused(MINE | {"seed": 7, "data": "1" * 64, "global_batch_size": 16}, allowed="seed")
    assert "its data is 111111111111, this run's is dddddddddddd" in said
    assert "its global_batch_size is 16, this run's is 8" in said and "its seed is 7, this run's is 42" in said
    assert "another data and global_batch_size by --allow-other data,global_batch_size,seed" in said


def test_another_batch_says_which_sample_is_next():
    line = describe(Change(step=5, key="global_batch_size", was=16, now=8))
    assert "5 x 16 samples were seen" in line and "5 x 8 is the next" in line


def test_parameters_of_other_names_or_shapes_cannot_be_allowed():
    said = refused(MINE | {"spec": "3" * 64}, allowed=",".join(MEANING), misfit="head.norm.weight has shape [3] there")
    assert "no option allows it" in said and "head.norm.weight has shape [3] there" in said
    assert "--allow-other" not in said


@pytest.mark.parametrize("kind", ["SGD", "Lion", "Muon", None])
def test_an_optimizer_with_another_state_cannot_be_allowed(kind):
    said = refused(MINE | {"optimizer": kind}, allowed="optimizer")
    assert "no option allows it" in said and str(kind) in said and "AdamW" in said and "--init-from" in said


def test_another_spec_is_told_by_the_options_that_differ(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step_00000005"
    saved = MINE | {"spec": "3" * 64}
    for content in (None, "[]", "not JSON", "[" * 100_000):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        assert "--residual" not in refused(saved, path=checkpoint)
    (tmp_path / "config.json").write_text(json.dumps({"residual": "vanilla", "attention": "softmax", "steps": 3}))
    said = refused(saved, path=checkpoint)
    assert "--residual 'vanilla' there, 'layer_scale' here" in said
    assert "--attention" not in said and "--steps" not in said


def test_the_history_is_kept_and_a_damaged_one_refused():
    before = {"step": 2, "key": "data", "was": "0" * 64, "now": "d" * 64}
    history = resumed(MINE | {"history": [before], "seed": 7}, allowed="seed")
    assert [change.model_dump() for change in history] == [before, {"step": 5, "key": "seed", "was": 7, "now": 42}]
    for damaged in ("x", [3], [{"step": 2}], [before | {"key": "weather"}], {"step": 1}):
        assert "is damaged" in refused(MINE | {"history": damaged})
    assert "is damaged" in refused(MINE | {"seed": [7]}, allowed="seed")


def test_a_key_that_is_none(capsys):
    arguments = "--data d --run-dir r --deepspeed_config c".split()
    for given in ("sead", "seed,,data", "all"):
        with pytest.raises(UserError, match="is no key: give some of data, tokenizer, spec, global_batch_size, seed"):
            parse([*arguments, "--resume", "auto", "--allow-other", given])
    with pytest.raises(UserError, match="only a resume can have another: give --resume too"):
        parse([*arguments, "--allow-other", "seed"])
    assert parse([*arguments, "--resume", "auto", "--allow-other", "seed,data"]).run.allow_other == "seed,data"


@pytest.fixture
def workplace(tmp_path):
    """Two data sets of one tokenizer, one of another, and a DeepSpeed JSON."""
    rows = [json.dumps({"text": f"The {n}th of some lines, which are all alike. " * 20}) for n in range(9)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    data_prep(
        [
            "--source",
            "jsonl",
            "--input",
            str(tmp_path / "text.jsonl"),
            "--out",
            str(tmp_path / "data"),
            "--validation-fraction",
            "0.3",
        ]
    )
    for name, (part, key, value) in {
        "other": ("source", "revision", "another"),
        "words": ("tokenizer", "sha256", "9" * 64),
    }.items():
        shutil.copytree(tmp_path / "data", tmp_path / name)
        tree = json.loads((tmp_path / name / "manifest.json").read_text())
        tree["content"][part][key] = value
        (tmp_path / name / "manifest.json").write_text(json.dumps(tree))
    tree = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "zero_optimization": {"stage": 1}}
    (tmp_path / "ds.json").write_text(json.dumps(tree))
    return tmp_path


def prepared(workplace: Path, *options: str, data: str = "data"):
    sizes = [str(part) for key, value in SIZES.items() for part in (f"--{key}", value)]
    given = ["--data", str(workplace / data), "--run-dir", str(workplace / "run"), "--eval", ""]
    given += ["--deepspeed_config", str(workplace / "ds.json"), "--steps", "9", "--global-batch-size", "8"]
    return prepare(parse([*given, *sizes, *options]))


def test_a_run_is_prepared_with_what_was_allowed_and_its_history(workplace):
    """From files: the tokenizer apart from the data, and what the next checkpoint will hold."""
    start = prepared(workplace)
    made_run(workplace / "old", step=5, identity=start.identity)
    resume = ("--resume", str(workplace / "old"))
    assert prepared(workplace, *resume).identity == start.identity

    with pytest.raises(UserError) as caught:
        prepared(workplace, *resume, data="other")
    assert "its data is" in str(caught.value) and "tokenizer" not in str(caught.value)
    with pytest.raises(UserError, match="its data is .*; its tokenizer is .*, this run's is 999999999999"):
        prepared(workplace, *resume, "--allow-other", "data", data="words")
    with pytest.raises(UserError, match="its spec is .*no option allows it, for the parameters are others"):
        prepared(workplace, *resume, "--layers", "3", "--allow-other", "spec")
    with pytest.raises(UserError, match="--residual 'vanilla' there, 'layer_scale' here.*no option allows it"):
        prepared(workplace, *resume, "--residual", "layer_scale", "--allow-other", "spec")

    allowed = prepared(workplace, *resume, "--seed", "7", "--allow-other", "seed,data", data="other")
    assert allowed.identity["seed"] == 7 and allowed.identity["data"] != start.identity["data"]
    assert [(c["step"], c["key"], c["was"], c["now"]) for c in allowed.identity["history"]] == [
        (5, "data", start.identity["data"], allowed.identity["data"]),
        (5, "seed", 42, 7),
    ]
    made_run(workplace / "newer", step=6, identity=allowed.identity)
    again = prepared(workplace, "--resume", str(workplace / "newer"), "--seed", "7", data="other")
    assert again.identity == allowed.identity
    assert prepared(workplace, *resume, "--activation", "gelu", "--allow-other", "spec").changes[0].key == "spec"
