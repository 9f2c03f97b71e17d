"""What a run will need, told before it starts: ``--dry-run``."""

import json
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses import FakeTensorMode

from megaresid.config import RunConfig
from megaresid.model.count import parameters_by_component
from megaresid.model.flops import forward_flops_per_token, training_flops_per_token
from megaresid.model.gpt import GPT
from megaresid.model.measure import saved_bytes
from megaresid.model.pipeline import describe_stages, stage_layers, stage_parameters
from megaresid.model.plan import ModelPlan
from megaresid.training.ds_config import Batch, DeepSpeedConfig


def saved_activation_bytes(plan: ModelPlan, batch: Batch, recompute: bool, autocast: str | None) -> int:
    """Bytes that one forward of a micro-batch keeps for its backward, parameters and integers excluded.

    Counted, not derived: the model runs on fake tensors, which have shapes and dtypes but no memory.
    """
    with FakeTensorMode():
        model = GPT(plan, activation_checkpointing=recompute)
        idx = torch.zeros(batch.micro, plan.shape.context, dtype=torch.int64)
        cast = torch.autocast("cpu", dtype=getattr(torch, autocast)) if autocast else nullcontext()
        with cast:
            return saved_bytes(lambda: model(idx, idx), (*model.parameters(), *model.buffers()))


def memory_per_rank(plan: ModelPlan, config: RunConfig, ds_config: DeepSpeedConfig, batch: Batch) -> dict[str, int]:
    """Bytes per rank by purpose, between steps: two states a parameter for the Adam family, one for any other
    optimizer. Buffers of communication and of the allocator come on top. Of a pipeline's stages it is the most that one
    has for each purpose."""
    shape, ranks, stage = plan.shape, batch.ranks, ds_config.stage
    parameters = sum(parameters_by_component(plan).values())
    parameters += (shape.padded_vocab_size - shape.vocab_size) * shape.width
    activations = saved_activation_bytes(
        plan, batch, config.execution.activation_checkpointing, ds_config.autocast_dtype
    )
    if (stages := config.execution.pipeline_stages) > 1:
        parameters = max(stage_parameters(plan, stages))
        # A stage keeps its share of each micro-batch that has not come back to it: the first stage of the most.
        under_way = (
            len(layers) * min(stages - number, batch.accumulation)
            for number, layers in enumerate(stage_layers(plan, stages))
        )
        activations = activations * max(under_way) // shape.layers
    half = ds_config.engine.get("bf16", {}).get("enabled", False)
    states = 2 if "adam" in ds_config.engine["optimizer"]["type"].lower() else 1
    offloaded = ds_config.engine["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    masters = 0 if stage == 0 else 4 * parameters // ranks
    optimizer = masters + 4 * states * parameters // (ranks if stage else 1)
    return {
        "weights": (2 if half else 4) * parameters // (ranks if stage == 3 else 1),
        "gradients": 4 * parameters // (ranks if stage >= 2 else 1),
        "optimizer (offloaded)" if offloaded else "optimizer": optimizer,
        "saved activations": activations,
    }


def checkpoint_bytes(plan: ModelPlan, ds_config: DeepSpeedConfig) -> int:
    """Of a checkpoint's elements: fp32 parameters and as many optimizer states as ``memory_per_rank`` counts."""
    parameters = sum(parameters_by_component(plan).values())
    parameters += (plan.shape.padded_vocab_size - plan.shape.vocab_size) * plan.shape.width
    states = 2 if "adam" in ds_config.engine["optimizer"]["type"].lower() else 1
    return 4 * (1 + states) * parameters


def print_estimate(
    plan: ModelPlan, config: RunConfig, ds_config: DeepSpeedConfig, batch: Batch, training_tokens: int
) -> None:
    """Print parameters, tokens, FLOPs, memory per rank and the resolved DeepSpeed JSON."""
    console = Console(soft_wrap=True, highlight=False)
    counts, flops = parameters_by_component(plan), forward_flops_per_token(plan)
    table = Table("component", "parameters", "forward FLOPs per token")
    for component in dict.fromkeys((*counts, *flops)):
        table.add_row(component, f"{counts.get(component, 0):,}", f"{flops.get(component, 0):,}")
    table.add_section()
    table.add_row("all", f"{sum(counts.values()):,}", f"{sum(flops.values()):,}")
    console.print(table)

    tokens_per_step = batch.sequences * plan.shape.context
    tokens = tokens_per_step * config.run.steps
    console.print(f"positions {plan.describe_positions()}")
    console.print(f"batch     {batch.describe(plan.shape.context)}")
    console.print(
        f"run       {config.run.steps:,} steps, {tokens:,} tokens ({tokens / training_tokens:.2f} epochs of "
        f"{training_tokens:,}), {training_flops_per_token(plan) * tokens:.3g} FLOPs"
    )
    if (stages := config.execution.pipeline_stages) > 1:
        for line in describe_stages(plan, stages):
            console.print(f"pipeline  {line}")
    memory = memory_per_rank(plan, config, ds_config, batch)
    ranks = batch.ranks * config.execution.pipeline_stages
    parts = ", ".join(f"{purpose} {size / 2**30:.2f}" for purpose, size in memory.items())
    on_device = sum(size for purpose, size in memory.items() if "offloaded" not in purpose)
    console.print(f"memory    about {on_device / 2**30:.2f} GiB per rank ({parts} GiB), buffers not counted")
    saved = checkpoint_bytes(plan, ds_config)
    console.print(
        f"saving    {saved / 2**30:.2f} GiB a checkpoint; {saved / ranks / 2**30:.2f} GiB of each rank's host memory "
        "hold the copy that is written in the background"
    )
    console.print(f"spec      {plan.hash}")
    console.print("DeepSpeed " + json.dumps(ds_config.engine), markup=False)
