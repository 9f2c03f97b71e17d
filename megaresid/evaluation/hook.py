"""The interface of evaluation during training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class Measurable(Protocol):
    """As much of the training engine as a measurement needs."""

    device: torch.device

    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of one micro-batch [m, T] in evaluation mode: a sum over valid targets by all positions."""


@dataclass(frozen=True)
class Hook:
    """Something to measure: every ``interval`` steps (0 for never), at the start and at the end of the run.

    ``measure`` is called by every rank, since it may call the model and collectives, and returns named numbers,
    equal on all ranks. It must leave the engine as it found it.
    """

    name: str
    interval: int
    measure: Callable[[Measurable], dict[str, float]]

    def due(self, step: int, last: int) -> bool:
        """Whether to measure after ``step`` updates of a run of ``last``."""
        return self.interval > 0 and (step % self.interval == 0 or step == last)
