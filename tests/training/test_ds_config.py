"""The user's DeepSpeed JSON: what is filled in, and what is refused."""

import json

import pytest

from megaresid.config import from_flat
from megaresid.errors import UserError
from megaresid.training.ds_config import plan_batch, resolve

CONFIG = from_flat(
    {"global_batch_size": 24, "micro_batch_size": 3, "clip": 0.5, "weight_decay": 0.2, "learning_rate": 0.01}, "test"
)
ADAMW = {"type": "AdamW", "params": {"torch_adam": True}}


def resolved(tmp_path, tree, config=CONFIG):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree) if isinstance(tree, dict) else tree)
    return resolve(path, config, plan_batch(config, ranks=2))


def test_what_is_auto_or_absent_comes_from_the_options(tmp_path):
    found = resolved(tmp_path, {"train_batch_size": "auto", "optimizer": ADAMW, "tensorboard": {"enabled": True}})
    engine = found.engine
    assert engine["train_batch_size"] == 24 and engine["train_micro_batch_size_per_gpu"] == 3
    assert engine["gradient_accumulation_steps"] == 4 and engine["gradient_clipping"] == 0.5
    wanted = {"torch_adam": True, "lr": 0.01, "weight_decay": 0.2, "betas": [0.9, 0.95]}
    assert engine["optimizer"]["params"] == wanted
    assert found.stage == 0 and found.monitors == {"tensorboard": {"enabled": True}} and "tensorboard" not in engine


def test_values_that_agree_with_the_options_are_kept(tmp_path):
    params = {"lr": 0.01, "weight_decay": 0.2, "betas": [0.9, 0.95]}
    tree = {"gradient_clipping": 0.5, "optimizer": {"type": "AdamW", "params": params}}
    assert resolved(tmp_path, tree).engine["optimizer"]["params"] == params


@pytest.mark.parametrize("dtype", [{}, {"dtype": "bf16"}, {"dtype": "torch.bfloat16"}])
def test_every_spelling_of_bfloat16_is_one(tmp_path, dtype):
    """Without a dtype DeepSpeed would take the device's default, which is float16 on a GPU."""
    found = resolved(tmp_path, {"optimizer": ADAMW, "torch_autocast": {"enabled": True, **dtype}})
    assert found.engine["torch_autocast"]["dtype"] == found.autocast_dtype == "bfloat16"


def test_what_a_run_has_written_is_read_again(tmp_path):
    once = resolved(tmp_path, {"optimizer": ADAMW, "csv_monitor": {"enabled": True}})
    assert resolved(tmp_path, {"schema": 1, **once.engine, **once.monitors}) == once


def test_sgd_is_given_no_betas(tmp_path):
    assert "betas" not in resolved(tmp_path, {"optimizer": {"type": "SGD"}}).engine["optimizer"]["params"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_batch_size": 16}, "train_batch_size is 16 but --global-batch-size is 24"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2 but the accumulation is 4"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0 but --clip is 0.5"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "lr is 1.0 but --learning-rate is 0.01"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}}, "betas is .* but --betas is"),
        ({"optimizer": {}}, "no optimizer is named"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is not supported here: .* use --schedule"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported here"),
        ({"zero_optimisation": {"stage": 1}}, "unknown key 'zero_optimisation': did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4"),
        ({"zero_optimization": {"stag": 1}}, "zero_optimization.stag: unknown key: did you mean 'stage'"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}}, "reduce_bucket_size: Input should be"),
        ({"optimizer": {"type": "SGD", "params": {"momentun": 0.9}}}, "momentun: unknown key: did you mean 'momentum'"),
        ({"optimizer": {"type": "Muon"}}, "Muon is not supported"),
        ({"optimizer": {"type": "muon"}}, "Muon is not supported"),
        ({"optimizer": {"type": "AdmW"}}, "optimizer.type 'AdmW': did you mean 'AdamW'"),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, "optimizer.parms: unknown key: did you mean 'params'"),
        ({"optimizer": {"type": "AdamW", "params": {"esp": 1e-8}}}, "params.esp: unknown key: did you mean 'eps'"),
        ({"optimizer": {"type": "AdamW", "params": None}}, "optimizer.params is None"),
        ({"zero_optimization": 1}, "zero_optimization is 1: expected an object"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype is 'float16'"),
        ({"torch_autocast": {"enable": True}}, "torch_autocast.enable: unknown key: did you mean 'enabled'"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean 'grad_accum_dtype'"),
        ({"tensorboard": {"enable": True}}, "tensorboard.enable: unknown key: did you mean 'enabled'"),
        ({"bf16": {"enabled": True}}, "bf16.enabled with ZeRO 0 has no fp32 weights"),
    ],
)
def test_mistakes_name_the_file_the_key_and_the_mend(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        resolved(tmp_path, {"optimizer": ADAMW, **change})
    assert "ds.json" in str(caught.value)


@pytest.mark.parametrize("text, message", [("{,}", "not JSON"), ("3", "expected an object")])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        resolved(tmp_path, text)


def test_compile_with_zero_3_is_refused(tmp_path):
    config = from_flat({"compile": True}, "test", CONFIG)
    with pytest.raises(UserError, match="--compile does not work with ZeRO-3"):
        resolved(tmp_path, {"optimizer": ADAMW, "zero_optimization": {"stage": 3}}, config)


@pytest.mark.parametrize("micro, ranks, split", [(3, 2, (3, 4)), (None, 1, (12, 2)), (None, 3, (8, 1)), (24, 1, (24, 1))])
def test_the_global_batch_is_split_exactly(micro, ranks, split):
    batch = plan_batch(from_flat({"micro_batch_size": micro}, "test", CONFIG), ranks)
    assert (batch.micro, batch.accumulation) == split and batch.sequences == 24


@pytest.mark.parametrize("micro, ranks, message", [(None, 5, "24 is not divisible by the 5 ranks"), (5, 2, "micro-batch 5 x 2")])
def test_a_batch_that_does_not_divide_is_refused(micro, ranks, message):
    with pytest.raises(UserError, match=message):
        plan_batch(from_flat({"micro_batch_size": micro}, "test", CONFIG), ranks)
