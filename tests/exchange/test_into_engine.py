"""A training that starts from an exported model."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from made_runs import configuration, made_run

from megaresid.errors import UserError
from megaresid.exchange.into_engine import copy_exported
from megaresid.export import export
from megaresid.model.gpt import canonical_parameters
from megaresid.training.checkpoint import read_parameters, save_checkpoint
from megaresid.training.ds_config import plan_batch, resolve
from megaresid.training.engine import Engine
from megaresid.training.run_dir import write_json


def start(stage: int, folder: str, **options) -> Engine:
    config = configuration(global_batch_size=4, **options)
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    path = Path(folder) / f"ds{dist.get_rank()}.json"
    write_json(path, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "zero_optimization": zero})
    batch = plan_batch(config, dist.get_world_size())
    return Engine(config.plan(), config, resolve(path, config, batch), batch)


def copied(stages: list[int], folder: str) -> list[tuple[dict, float]]:
    """Runs on every rank: the parameters that each stage's engine saves after the copy, and its loss."""
    idx = torch.arange(13).repeat(2, 1)
    found = []
    for stage in stages:
        engine = start(stage, folder)
        copy_exported(engine.deepspeed, engine.parameters, Path(folder) / "out")
        loss = engine.loss(idx[:, :-1], idx[:, 1:]).item()
        place, nothing = Path(folder) / f"stage{stage}", {"counters": {}, "identity": {}}
        found.append((save_checkpoint(engine.deepspeed, engine.parameters, place, step=1, **nothing), loss))
        engine.deepspeed.destroy()
    return [(read_parameters(path), loss) for path, loss in found]


@pytest.mark.full
def test_every_stage_starts_from_the_exported_weights(ranks2, tmp_path):
    export_and_copy(ranks2, tmp_path, [0, 1, 2])


def export_and_copy(ranks, tmp_path, stages):
    model = made_run(tmp_path / "run")
    export(tmp_path / "run", "safetensors", tmp_path / "out")
    parameters = canonical_parameters(model, model.prefixes)
    idx = torch.arange(13).repeat(2, 1)
    expected = torch.nn.functional.cross_entropy(model(idx[:, :-1])[0].flatten(0, 1), idx[:, 1:].flatten()).item()
    for of_rank in ranks.run(copied, stages, str(tmp_path)):
        for saved, loss in of_rank:
            assert saved.keys() == parameters.keys()
            assert all(torch.equal(saved[name], parameter) for name, parameter in parameters.items())
            assert loss == pytest.approx(expected, rel=1e-5)


def refused(folder: str, **options) -> str:
    """Runs on every rank: what is said, where the engine's parameters stay as they were."""
    engine = start(1, folder, **options)
    before = {name: parameter.detach().clone() for name, parameter in engine.parameters.items()}
    with pytest.raises(UserError) as raised:
        copy_exported(engine.deepspeed, engine.parameters, Path(folder) / "out")
    assert all(torch.equal(before[name], parameter) for name, parameter in engine.parameters.items())
    engine.deepspeed.destroy()
    return str(raised.value)


def test_zero_3_starts_from_the_exported_weights(ranks2, tmp_path):
    export_and_copy(ranks2, tmp_path, [3])


def test_a_damaged_or_another_model_changes_nothing(ranks1, tmp_path):
    made_run(tmp_path / "run")
    export(tmp_path / "run", "safetensors", tmp_path / "out")
    (said,) = ranks1.run(refused_of_another_width, str(tmp_path))
    assert re.search(r"embed.tokens.weight has shape \[50304, 16\] there and \[50304, 24\] here", said)
    content = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(content)
    (said,) = ranks1.run(refused, str(tmp_path))
    assert "model.safetensors: its bytes are not those" in said


def refused_of_another_width(folder: str) -> str:
    return refused(folder, width=24)
