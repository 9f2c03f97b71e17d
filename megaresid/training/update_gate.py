"""Between the norm of a step's gradient and its update: whether the update is made, under any ZeRO stage."""

from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megaresid.training.optimizer import total_norm

REFUSED = float("inf")
Ask = Callable[[torch.Tensor], bool]


class UpdateGate:
    """Asks, once a step, whether a DeepSpeed engine may update its parameters, given the global norm before clipping.

    DeepSpeed's optimizers of ZeRO 1 to 3 drop a step whose norm is not finite: no parameter, no optimizer state and no
    step count of Adam changes. The gate stands where they have taken the norm, and hands on an infinite one where the
    answer is no, so that a refused step goes the same way and costs no second pass over the gradients. Stage 0 has no
    such way and keeps no norm: the gate takes it, and passes over the optimizer.
    """

    def __init__(self, engine, gradients: Callable[[], list[torch.Tensor]]):
        """``engine`` is DeepSpeed's; ``gradients()`` are those of this rank's parameters at stage 0, averaged."""
        self._engine, self._gradients = engine, gradients
        self._ask: Ask | None = None
        self._accepted: bool | None = None
        self._norm_of_bf16 = nullcontext
        optimizer = engine.optimizer
        self._unsharded = False
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._stand_in_stage3(optimizer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            self._stand_in_stages12(optimizer)
        elif isinstance(optimizer, BF16_Optimizer):
            self._stand_in_bf16()
        else:
            self._unsharded = True
            self._stand_in_unsharded(optimizer)

    def step(self, ask: Ask) -> bool:
        """The engine's step at the end of its micro-batches; whether parameters were updated.

        Called by every rank. ``ask(norm)`` is called exactly once, before anything has changed, with fp32 []; its
        answer must be the same on all ranks. A norm that is not finite comes as infinity and is refused in any case.
        """
        self._ask, self._accepted = ask, None
        before = self._engine.skipped_steps
        if self._unsharded and not self._accepts(total_norm(self._gradients())):
            self._engine.skipped_steps += 1
        with self._norm_of_bf16():
            self._engine.step()
        if self._accepted is None:  # bf16: seen to be not finite before the norm was taken
            self._accepts(torch.tensor(REFUSED))
        return self._engine.skipped_steps == before

    def _accepts(self, norm: torch.Tensor) -> bool:
        # A group of parameters whose norm is not finite has -1 in some of DeepSpeed's optimizers.
        norm = torch.where(torch.isfinite(norm) & (norm >= 0), norm, REFUSED)
        self._accepted = self._ask(norm)
        return self._accepted

    def _passed_on(self, norm: torch.Tensor) -> torch.Tensor:
        return norm if self._accepts(norm) else torch.full_like(norm, REFUSED)

    def _stand_in_stages12(self, zero: DeepSpeedZeroOptimizer) -> None:
        norm_of = zero.scaled_global_norm
        zero.scaled_global_norm = lambda *args: self._passed_on(norm_of(*args))

    def _stand_in_stage3(self, zero: DeepSpeedZeroOptimizer_Stage3) -> None:
        norms_of = zero._get_norm_groups
        zero._get_norm_groups = lambda: [self._passed_on(combine_grad_norm_groups(norms_of()))]

    def _stand_in_bf16(self) -> None:
        norm_of = bf16_optimizer.get_global_norm_of_tensors

        # No method of the optimizer stands between norm and update, only this function of its module.
        self._norm_of_bf16 = lambda: patch.object(
            bf16_optimizer,
            "get_global_norm_of_tensors",
            lambda *args, **options: self._passed_on(norm_of(*args, **options)),
        )

    def _stand_in_unsharded(self, optimizer: torch.optim.Optimizer) -> None:
        update = optimizer.step
        # The gradients, which clipping may have made worse, are dropped by the engine afterwards.
        optimizer.step = lambda *args, **options: update(*args, **options) if self._accepted else None
