"""What a site or a mixer shows of itself in diagnostics. Which kind a reading is decides how it is kept and drawn."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Values:
    """A gate, a scale, a lambda, a decay: any shape; a scalar of its mean, and a histogram where there are several."""

    values: Tensor


@dataclass(frozen=True)
class Depth:
    """Weights [S], or [B, T, S] by token, that a site gives to earlier outputs: one row of the matrix over depth.

    ``sources`` names each of the S, such as ``"embed"`` and ``"03.mlp"``.
    """

    weights: Tensor
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Mixing:
    """A matrix [n, n], or [B, T, n, n] by token, from the streams before a site (columns) to those after it (rows)."""

    matrix: Tensor


Reading = Values | Depth | Mixing
