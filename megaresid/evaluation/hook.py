"""The interface of evaluation: what is measured, when, and what a measurement sees of a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Measurable(Protocol):
    """What evaluation sees of a live engine or of a loaded model. Every rank calls its methods equally often."""

    device: torch.device
    context: int
    """Most tokens of one sequence of inputs."""
    vocab_size: int
    """Ids that can be predicted: 0 to vocab_size - 1."""
    positions_per_forward: int
    """Micro-batch x context: the most m x T of one call, padding included."""
    parameters: Mapping[str, torch.nn.Parameter]
    """By canonical name. Under ZeRO-3 a rank holds none of them whole."""

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The loss of one micro-batch [m, T] in evaluation mode: a sum over valid targets by all positions."""

    def score(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (nats) of the wanted targets, in evaluation mode, without gradients, in its precision.

        Args:
            idx: int64 [m, T], T at most ``context``; m and T may differ between ranks.
            targets: int64 [m, T], or [m, T, K] for K targets of each position; a negative one is not wanted.

        Returns:
            fp32 [n] log-probabilities and bool [n] whether the target is the likeliest token, of the n wanted targets
            in row-major order. Logits exist at wanted positions only, a block at a time.
        """


Measure = Callable[[Measurable], dict[str, float]]
"""Called by every rank, since it may call the model and collectives; returns named numbers, equal on all ranks."""


@dataclass(frozen=True)
class Hook:
    """Something to measure in training: at step 0, every ``interval`` steps and at the end; for None at the end alone.

    ``megaresid.evaluation.running`` says what ``measure`` must hold to.
    """

    name: str
    interval: int | None
    measure: Measure

    def due(self, step: int, last: int) -> bool:
        """Whether to measure after ``step`` updates of a run of ``last``."""
        return step == last or (self.interval is not None and step % self.interval == 0)

    def when(self) -> str:
        """In words."""
        return "at the end" if self.interval is None else f"every {self.interval:,} steps and at both ends"
