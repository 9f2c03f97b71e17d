"""What --dry-run promises, against what a run really holds."""

import pytest
import torch
from gpt_runs import ADAMW, configuration, micro_batches, plan_of, start_engine

from megaresid.config import from_flat
from megaresid.model.gpt import build
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape
from megaresid.training.ds_config import Batch, DeepSpeedConfig
from megaresid.training.estimate import memory_per_rank, print_estimate, saved_activation_bytes

SHAPE = ModelShape(layers=3, heads=2, width=64, context=128, vocab_size=600)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_saved_bytes_are_those_of_a_real_forward(recompute, autocast):
    """Unique storages that autograd saves in a real forward on real memory, parameters apart."""
    plan, batch = ModelPlan(SHAPE), Batch(micro=2, accumulation=1, ranks=1)
    model = build(plan, seed=0, activation_checkpointing=recompute)
    owned, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    kept = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # alive, so that no address is used twice
        return tensor

    idx = torch.zeros(2, SHAPE.context, dtype=torch.int64)
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        model(idx, idx)
    assert saved_activation_bytes(plan, batch, recompute, autocast) == pytest.approx(sum(saved.values()), rel=0.01)


def held_bytes(stage: int, folder: str) -> tuple[dict[str, int], dict[str, int]]:
    """Runs on every rank: what was promised, and the storages that the engine holds after two steps."""
    config = configuration(width=64, micro_batch_size=4)
    engine = start_engine(config, {"optimizer": ADAMW, "zero_optimization": {"stage": stage}}, folder)
    source = micro_batches(config, engine.batch, torch.distributed.get_rank())
    for _ in range(2):
        engine.train_step(source, 1e-3)

    def storages(tensors) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    optimizer = getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    weights = [getattr(p, "ds_tensor", p.data) for p in engine.parameters.values()]
    masters = [p for group in optimizer.param_groups for p in group["params"]] if stage else []
    if stage == 3:  # it lends its masters to the optimizer for the step alone
        masters = engine.deepspeed.optimizer.fp32_partitioned_groups_flat
    found = {"weights": storages(weights), "optimizer": storages(states) + storages(masters)}

    tree = {"optimizer": ADAMW, "zero_optimization": {"stage": stage}}
    promised = memory_per_rank(plan_of(config), config, DeepSpeedConfig(tree, {}), engine.batch)
    engine.deepspeed.destroy()
    return promised, found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_rank_holds_is_what_was_promised(stage, ranks2, tmp_path):
    """Within 10%: partitions are padded to equal sizes, and ZeRO-3 keeps its smallest parameters whole."""
    for promised, found in ranks2.run(held_bytes, stage, str(tmp_path)):
        for purpose, size in found.items():
            assert size == pytest.approx(promised[purpose], rel=0.1), purpose


def test_the_dry_run_names_the_published_count(capsys):

    config = from_flat({"model": "gpt2-medium", "steps": 13_535, "micro_batch_size": 32}, "test")
    ds_config = DeepSpeedConfig({"optimizer": ADAMW, "zero_optimization": {"stage": 1}}, {})
    print_estimate(ModelPlan(config.shape), config, ds_config, Batch(32, 8, 2), training_tokens=10_000_000_000)
    said = capsys.readouterr().out
    assert "354,823,168" in said and "positions learned, for softmax in 24 of 24 layers" in said
    assert "3.97 GiB a checkpoint; 1.98 GiB of each rank's host memory" in said  # 12 bytes a parameter, over two ranks
    assert "512 sequences, 524,288 tokens per step" in said and "7,096,238,080 tokens (0.71 epochs" in said
