"""One row of the table of variants."""

from collections.abc import Callable
from dataclasses import dataclass

from small_models import Case


@dataclass(frozen=True)
class Row:
    """``spec`` as a user writes it, and its definition (see ``variant_models``).

    ``added_parameters``: beside vanilla at 24 layers of width 1024, counted by hand from the paper's shapes.
    ``step``: for what depends on the optimizer step. ``layers``: the fewest in which all its kinds of sites occur.
    ``head_of_family``: stands for its family in slow quick tests.
    """

    spec: str
    define: Callable
    added_parameters: int
    step: int = 0
    layers: int = 2
    head_of_family: bool = False

    @property
    def case(self) -> Case:
        return Case(self.spec, "softmax", self.layers, self.step)

    def __str__(self) -> str:
        return self.spec
