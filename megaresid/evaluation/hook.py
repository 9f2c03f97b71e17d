"""The interface of evaluation during training."""

from collections.abc import Callable
from dataclasses import dataclass

from megaresid.training.engine import Engine


@dataclass(frozen=True)
class Hook:
    """Something to measure: every ``interval`` steps (0 for never), at the start and at the end of the run.

    ``measure`` is called by every rank, since it may call the model and collectives, and returns named numbers,
    equal on all ranks. It must leave the engine as it found it.
    """

    name: str
    interval: int
    measure: Callable[[Engine], dict[str, float]]

    def due(self, step: int, last: int) -> bool:
        """Whether to measure after ``step`` updates of a run of ``last``."""
        return self.interval > 0 and (step % self.interval == 0 or step == last)
