"""What a rank writes to a checkpoint, copied out of the engine, so that training can go on while it is written."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaresid.training.checkpoint_format import Layout, fill, layout_of
from megaresid.training.zero_state import live_state

ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True)
class Described:
    """What the header of the checkpoint says of a rank: full shapes by canonical name, the optimizer's numbers by
    parameter and key, and the generators' states in base64 by device."""

    shapes: dict[str, list[int]]
    scalars: dict[str, dict[str, int | float]]
    generators: dict[str, str]


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of the checkpoint of ``step``, in memory of its own: ``elements`` are the bytes (uint8, on the CPU)
    that ``layout`` orders; ``counters`` and ``identity`` are the caller's, ``engine`` DeepSpeed's counters."""

    step: int
    layout: Layout
    elements: Tensor
    described: Described
    engine: dict[str, int]
    counters: dict[str, Any]
    identity: dict[str, Any]


def take_snapshot(
    engine,
    parameters: Mapping[str, nn.Parameter],
    rank: int,
    ranks: int,
    *,
    step: int,
    counters: dict[str, Any],
    identity: dict[str, Any],
    buffer: Tensor | None = None,
) -> Snapshot:
    """Copy this rank's part of the state of a DeepSpeed engine between two steps. Without collectives.

    ``buffer`` are the ``elements`` of an earlier snapshot that is no longer needed: their memory is used again where
    its size fits. Where a tensor is on a GPU the memory is pinned, and the copies are complete when this returns.
    """
    if engine.micro_steps % engine.gradient_accumulation_steps():
        raise ValueError("between two micro-batches of a step: the gradients so far would be lost")
    # Copied too, and refused here rather than by the thread that writes.
    counters, identity = json.loads(json.dumps([counters, identity]))
    live = live_state(engine, parameters)
    tensors, runs = {}, {}
    for kind, fragment, elements in live.tensors(rank, ranks):
        tensors[kind, fragment.name] = elements
        runs[fragment.name] = fragment.offset, fragment.length
    layout = layout_of(tensors, runs)
    on_gpu = any(tensor.is_cuda for tensor in tensors.values())
    if buffer is None or buffer.numel() != layout.size:
        buffer = torch.empty(layout.size, dtype=torch.uint8, pin_memory=on_gpu)
    fill(buffer, layout, tensors)
    if on_gpu:
        torch.cuda.synchronize()
    return Snapshot(
        step=step,
        layout=layout,
        elements=buffer,
        described=Described(shapes_of(parameters), live.scalars(), _generator_states()),
        engine={name: getattr(engine, name) for name in ENGINE_COUNTERS},
        counters=counters,
        identity=identity,
    )


def shapes_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[int]]:
    """Full shapes; ZeRO-3 leaves an empty tensor in the module and keeps the shape aside."""
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters.items()}


def _generator_states() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}
