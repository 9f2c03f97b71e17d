"""The interface of mixers: what carries information between tokens."""

from typing import ClassVar

import torch
from torch import nn

from megaresid.model.presets import ModelShape
from megaresid.spec import Options, Registry

Side = tuple[torch.Tensor, ...]

MIXERS = Registry("attention", "megaresid.attention")


class Mixer(nn.Module):
    """Maps normed [B, T, C] to [B, T, C], causally: output t depends on inputs 0..t alone.

    It is bare (no norm of its input, no residual). ``needs_positions`` asks for learned position embeddings: a
    model has them when one of its mixers needs them.
    """

    name: ClassVar[str]
    citation: ClassVar[str]
    needs_positions: ClassVar[bool]
    Options: ClassVar[type[Options]] = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int):
        super().__init__()

    def forward(self, x: torch.Tensor, side: Side) -> tuple[torch.Tensor, Side]:
        """``side`` is what mixers share over depth; a mixer returns it as it is or with its own entries added."""
        raise NotImplementedError

    @classmethod
    def flops_per_token(cls, shape: ModelShape, options: Options) -> int:
        """Forward FLOPs per token of matrix products, averaged over a context of ``shape.context`` tokens."""
        raise NotImplementedError
