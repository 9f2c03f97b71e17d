"""Where DeepSpeed keeps parameters and optimizer state: one interface (``LiveState``), one file a way of laying out."""

from collections.abc import Mapping

import torch
from torch import nn

from megaresid.errors import UserError
from megaresid.training.zero_state import pipeline, stage0, stage3, stages12
from megaresid.training.zero_state.live import LiveState


def live_state(engine, parameters: Mapping[str, nn.Parameter]) -> LiveState:
    """The state of a DeepSpeed engine's ``parameters`` (by canonical name) on this rank.

    Raises ``UserError`` for a kind of engine whose state no file here knows.
    """
    from deepspeed.runtime.pipe.engine import PipelineEngine

    live = _of_optimizer(engine.optimizer, parameters)
    return pipeline.live_state(live, engine, parameters) if isinstance(engine, PipelineEngine) else live


def _of_optimizer(optimizer, parameters: Mapping[str, nn.Parameter]) -> LiveState:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    # Subclasses (ZenFlow, SuperOffload) keep more state than their bases, so the exact class decides.
    if type(optimizer) in (DeepSpeedZeroOptimizer, BF16_Optimizer):
        return stages12.live_state(optimizer, parameters)
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        return stage3.live_state(optimizer, parameters)
    if isinstance(optimizer, torch.optim.Optimizer):
        return stage0.live_state(optimizer, parameters)
    raise UserError(
        f"checkpoints do not know the state of DeepSpeed's {type(optimizer).__name__}: use ZeRO 0 in fp32 or "
        "torch_autocast, or ZeRO 1 to 3 without zenflow or super_offload"
    )
