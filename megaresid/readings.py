"""What a site or a mixer shows of itself in diagnostics. Which kind a reading is decides how it is kept and drawn."""

from dataclasses import dataclass

import torch
from torch import Tensor


def _kept(tensor: Tensor) -> Tensor:
    """A copy in fp32 or wider, without gradients: a parameter changes, and goes away where ranks share it out."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


@dataclass(frozen=True)
class Values:
    """A gate, a scale, a lambda, a decay: any shape; a scalar of its mean, and a histogram where there are several."""

    values: Tensor

    def __post_init__(self):
        object.__setattr__(self, "values", _kept(self.values))


@dataclass(frozen=True)
class Depth:
    """Weights [S], or [B, T, S] by token, that a site gives to earlier outputs: one row of the matrix over depth.

    ``sources`` names each of the S, such as ``"embed"`` and ``"03.mlp"``.
    """

    weights: Tensor
    sources: tuple[str, ...]

    def __post_init__(self):
        if self.weights.ndim < 1 or self.weights.shape[-1] != len(self.sources):
            raise ValueError(f"weights {[*self.weights.shape]} of {len(self.sources)} sources")
        object.__setattr__(self, "weights", _kept(self.weights))


@dataclass(frozen=True)
class Mixing:
    """A matrix [n, n], or [B, T, n, n] by token, from the streams before a site (columns) to those after it (rows)."""

    matrix: Tensor

    def __post_init__(self):
        if self.matrix.ndim < 2 or self.matrix.shape[-1] != self.matrix.shape[-2]:
            raise ValueError(f"a matrix {[*self.matrix.shape]} is not square")
        object.__setattr__(self, "matrix", _kept(self.matrix))


Reading = Values | Depth | Mixing
