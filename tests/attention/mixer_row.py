"""One row of the table of mixers."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """``spec`` as a user writes it, and its definition (see ``mixer_models``).

    ``layers``: the fewest in which all that the mixer does occurs; their outputs for one input are summed.
    ``heads``, ``width``: of the model. ``away``: the standard deviation of the noise that moves every parameter from
    its start. ``undriven``: endings of names of parameters, or of three inputs x_q, x_k and x_v, whose gradient is zero
    by the mathematics, with the reason in a comment beside the row. ``grows``: whether what a token adds to the carried
    state has no bound. ``head_of_family``: stands for its family in slow quick tests.
    """

    spec: str
    define: Callable
    layers: int = 1
    heads: int = 2
    width: int = 16
    away: float = 0.2
    undriven: tuple[str, ...] = ()
    grows: bool = False
    head_of_family: bool = False

    def __str__(self) -> str:
        return self.spec
