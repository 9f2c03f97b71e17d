"""A small GPT under the engine, on tokens that any rank can make: what several tests train."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed

from megaresid.config import RunConfig, from_flat
from megaresid.data.sampler import sample_indices
from megaresid.model.plan import ModelPlan
from megaresid.training.ds_config import data_parallel_ranks, plan_batch, resolve
from megaresid.training.engine import Engine
from megaresid.training.pipeline_engine import PipelineEngine

STEPS, GLOBAL_BATCH, VOCABULARY = 20, 8, 300
ADAMW = {"type": "AdamW", "params": {"torch_adam": True}}
FUSED_ADAMW = {"type": "AdamW", "params": {"torch_adam": True, "fused": True}}  # what ds_configs name
SGD = {"type": "SGD", "params": {"momentum": 0.9}}


def configuration(**options) -> RunConfig:
    shape = {"model": "tiny", "layers": 2, "heads": 2, "width": 32, "context": 24}
    values = {"steps": STEPS, "global_batch_size": GLOBAL_BATCH, "learning_rate": 0.01, "clip": 0.0, "seed": 3}
    return from_flat(shape | values | options, "test")


def plan_of(config: RunConfig) -> ModelPlan:
    shape = config.shape.model_copy(update={"vocab_size": VOCABULARY})
    return ModelPlan(shape, config.model.attention, config.model.residual)


def sample(index: int, context: int) -> torch.Tensor:
    """The tokens of one global sample [context + 1]: few ids of the many, so that there is much to learn."""
    generator = torch.Generator().manual_seed(index)
    start, stride = torch.randint(1, 40, (2,), generator=generator).tolist()
    noise = torch.randint(0, 2, (context + 1,), generator=generator)
    return (start + stride * torch.arange(context + 1) + noise) % 13


def micro_batches(
    config: RunConfig, batch, rank: int, first: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share from step ``first`` on."""
    sizes = {"global_batch": GLOBAL_BATCH, "ranks": batch.ranks, "micro_batch": batch.micro}
    for step in range(first, STEPS):
        for accumulation in range(batch.accumulation):
            rows = [sample(int(s), config.shape.context) for s in sample_indices(step, accumulation, rank, **sizes)]
            tokens = torch.stack(rows)
            yield tokens[:, :-1], tokens[:, 1:]


def start_engine(config: RunConfig, tree: dict, folder: str) -> Engine:
    """An engine on every rank of the group, or its part of a pipeline, for a DeepSpeed JSON given as a tree."""
    path = Path(folder) / f"rank{torch.distributed.get_rank()}.json"
    path.write_text(json.dumps(tree))
    batch = plan_batch(config, data_parallel_ranks(config, torch.distributed.get_world_size()))
    make_engine = PipelineEngine if config.execution.pipeline_stages > 1 else Engine
    return make_engine(plan_of(config), config, resolve(path, config, batch), batch)
