"""Each DeepSpeed JSON says what its name says, in the words of DeepSpeed's own parser."""

import copy
import json
import socket
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "ds_configs"
STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "cpu": 1, "h200x2": 1}
FILLED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.5,
}
FILLED_OPTIMIZER = {"lr": 2e-3, "betas": [0.8, 0.9], "weight_decay": 0.25}


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def filled(name):
    """The JSON with its autos replaced; a key of ours that is not "auto" in the file is an error."""
    tree = copy.deepcopy(read(name))
    for section, values in ((tree, FILLED), (tree["optimizer"]["params"], FILLED_OPTIMIZER)):
        for key, value in values.items():
            assert section[key] == "auto"
            section[key] = value
    assert '"auto"' not in json.dumps(tree)
    return tree


def test_no_file_is_left_out():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_deepspeed_reads_each_file(name):
    torch = pytest.importorskip("torch")
    from deepspeed.runtime.config import DeepSpeedConfig

    parsed = DeepSpeedConfig(filled(name))
    assert parsed.zero_optimization_stage == STAGES[name]
    assert (parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu) == (8, 2)
    assert (parsed.gradient_accumulation_steps, parsed.gradient_clipping) == (4, 1.5)
    assert parsed.optimizer_name == "adamw"
    assert parsed.optimizer_params["lr"] == 2e-3 and parsed.optimizer_params["eps"] == 1e-8
    assert parsed.scheduler_name is None
    assert parsed.grad_accum_dtype == "fp32"
    assert not parsed.float16_config.enabled and not parsed.bfloat16_config.enabled
    bf16 = name == "h200x2"
    assert parsed.torch_autocast_enabled == bf16
    assert parsed.torch_autocast_dtype == (torch.bfloat16 if bf16 else None)
    # With modules named here their gradients would be summed over the ranks in bf16.
    assert parsed.torch_autocast_lower_precision_safe_modules == ([] if bf16 else None)


def test_every_value_is_one_step_of_adamw_under_the_engine(monkeypatch):
    """Each file builds an engine on one process, and its first step is AdamW's: w - lr * (decay * w + sign(gradient)).

    The gradient of the loss is all ones, clipped to the norm 1.5; AdamW's first step has magnitude lr whatever it is.
    """
    torch = pytest.importorskip("torch")
    # ZeRO-3 puts a linear map of its own there, for good.
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    import deepspeed

    if torch.cuda.is_available():
        pytest.skip("one process on the CPU accelerator")
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(key, value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    for name in STAGES:
        tree = filled(name)
        tree |= {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        model = torch.nn.Linear(4, 4, bias=False)
        before = model.weight.detach().clone()
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=tree)
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            after = engine.module.weight.detach().float().clone()
        expected = before - 2e-3 * (0.25 * before + 1)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-6, msg=lambda text: f"{name}: {text}")
        engine.destroy()
    torch.distributed.destroy_process_group()
