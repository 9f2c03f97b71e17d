"""Configurations, option lists, layer specs, ``--eval``, parameter rules and DeepSpeed JSONs."""

import io
from contextlib import redirect_stderr, redirect_stdout

import pytest
from fuzz_inputs import spec_texts
from hypothesis import strategies as st
from trying import fuzz, nasty, texts

from megaresid.config import SECTIONS, RunConfig, from_flat, parse
from megaresid.errors import UserError
from megaresid.evaluation import chosen
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS
from megaresid.spec import parse_pattern
from megaresid.training.ds_config import PASSED_ON, plan_batch, resolve
from megaresid.training.rules import parse_override

FLAT = RunConfig().flat() | {"data": ["data"], "run_dir": "run", "deepspeed_config": "ds.json", "model": "tiny"}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@fuzz(300, text=texts(FLAT, [*SECTIONS, "validation_interval", "lerning_rate"]))
def test_configurations(folder, text):
    """--config FILE: what it makes is printed and read again the same, and plans a batch and a model."""
    (folder / "run.json").write_bytes(text)
    config = parse(["--config", str(folder / "run.json")])
    assert from_flat(config.flat(), "again") == config
    plan_batch(config, 2)
    config.plan()
    return "works"


VALUES = st.one_of(
    nasty().map(str),
    st.sampled_from(["1", "2", "0.5", "tiny", "gla", "auto", "cosine", "x", "true", "validation@5", "a b", "--", "-h"]),
)
NAMES = [f"--{key.replace('_', '-')}" for key in SECTIONS]
NAMES += ["--no-compile", "--dry-run", "--preset", "--config", "--x"]
OPTIONS = st.lists(st.one_of(st.sampled_from(NAMES), VALUES, st.sampled_from(NAMES)), max_size=6)


@fuzz(60, options=OPTIONS)
def test_option_lists(folder, options):
    """What tyro refuses it says itself, with exit code 2; --help ends with 0."""
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            parse(["--data", "d", "--run-dir", "r", "--deepspeed-config", "j", *options])
    except SystemExit as ended:
        assert ended.code == 2 or {"-h", "--help"} & set(options)
        assert "Traceback" not in said.getvalue()
        return "refused by tyro"
    return "works"


@fuzz(400, attention=spec_texts(), residual=spec_texts(), swap=st.booleans())
def test_layer_specs(folder, attention, residual, swap):
    """A pattern prints as one that is the same; a plan is made of it."""
    for text in (attention, residual):
        pattern = parse_pattern(text)
        assert str(parse_pattern(str(pattern))) == str(pattern)
    plan = ModelPlan(PRESETS["tiny"], attention, "vanilla") if swap else ModelPlan(PRESETS["tiny"], "softmax", residual)
    plan.tree()
    return "works"


PIECES = ["validation", "wikitext2", "lambada", "arc_easy", "@", ",", " ", "end", "500", "0", ":", "=", "a:b"]
ENTRIES = st.lists(
    st.one_of(
        st.sampled_from(PIECES),
        st.text(max_size=3),
        st.just("9" * 5000),
        st.from_regex(r"[a-z_0-9]{1,9}(,[a-z]{1,5}){0,2}@([0-9]{1,4}|end)( |$)", fullmatch=True),
    ),
    max_size=8,
).map("".join)


@fuzz(400, text=ENTRIES)
def test_evaluations(folder, text):
    entries = chosen.parse(text)
    for entry in entries:
        assert entry.names and (entry.interval is None or entry.interval > 0)
    return "works" if entries else "nothing"


MARKS = ["layers.*", ":", "=", ",", "decay", "lr_multiplier", "fp32", "true", "false", "5", "1e999", "nan", "["]
RULES = st.lists(st.sampled_from(MARKS), max_size=10).map("".join)
SETTING = st.builds(
    "{}={}".format,
    st.sampled_from(["decay", "lr_multiplier", "fp32", "x"]),
    st.sampled_from(["true", "5", "1e999", "no", " .5 "]),
)
SETTINGS = st.lists(SETTING, min_size=1, max_size=3).map(",".join)


@fuzz(600, text=st.one_of(RULES, RULES.map("layers.*:".__add__), SETTINGS.map("layers.*:".__add__)))
def test_parameter_rules(folder, text):
    change = parse_override(text).change
    assert change.lr_multiplier is None or 0 <= change.lr_multiplier < float("inf")
    return "works"


ZERO = {
    "stage": 2,
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
    "reduce_bucket_size": 500000,
    "overlap_comm": True,
}
DEEPSPEED = {
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-8, "torch_adam": True}},
    "zero_optimization": ZERO,
    "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
    "steps_per_print": 10,
    "csv_monitor": {"enabled": False, "output_path": "x"},
    "flops_profiler": {"enabled": False, "profile_step": 5},
}
KEYS = [*PASSED_ON, "scheduler", "fp16", "amp", "enabled", "type", "params", "stage", "weight_decay", "dtype", "device"]


@fuzz(400, text=texts(DEEPSPEED, KEYS))
def test_deepspeed_configurations(folder, text):
    """What passes is taken by DeepSpeed's own reader too."""
    from deepspeed.runtime.config import DeepSpeedConfig

    (folder / "ds.json").write_bytes(text)
    config = from_flat({"global_batch_size": 8}, "test")
    found = resolve(folder / "ds.json", config, plan_batch(config, 1))
    assert found.stage in (0, 1, 2, 3) and found.product_dtype and (found.epsilon is None or found.epsilon >= 0)
    DeepSpeedConfig(found.engine)
    return "works"


def test_the_command_tells_a_mistake_in_one_line(capsys):
    """Whatever newlines a value has."""
    from megaresid.errors import exits_with_user_errors

    @exits_with_user_errors
    def command():
        raise UserError("--eval a\nb\r\nc\x1b[31m: give names")

    with pytest.raises(SystemExit) as ended:
        command()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and said.endswith(": give names\n")
