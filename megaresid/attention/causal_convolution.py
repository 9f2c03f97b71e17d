"""A short convolution as a mixer of its own."""

from typing import Literal

import torch
from pydantic import Field

from megaresid import spec
from megaresid.attention.cache import Cache
from megaresid.attention.mixer import MIXERS, SEGMENT, Inputs, Mixer, Side, SideSpec
from megaresid.attention.projections import three
from megaresid.attention.short_convolution import ShortConvolution
from megaresid.model.presets import ModelShape


class Options(spec.Options):
    kernel: int = Field(4, ge=1, le=256)
    """Tokens that it sees, the present one included."""
    act: Literal["identity", "swish", "silu", "sigmoid", "relu", "elu"] = "identity"
    """What the sum goes through."""


@MIXERS.register("causal_conv")
class CausalConvolution(Mixer):
    """y_t = act(sum_{j=0}^{kernel-1} w_j * x_{t-j}) with a weight for every channel and tap: no projection, no bias.

    It tells the order of the last ``kernel`` tokens and sees no further. Of three inputs it takes that of the values.
    """

    citation = "this project"
    ways = True
    reads = (SEGMENT,)
    decodes = True
    Options = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.conv1d = ShortConvolution(shape.width, options.kernel, options.act)

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        inner = None if cache is None else cache.inside("conv1d")
        return self.conv1d(three(x)[2], self.segment(side), inner), side

    @classmethod
    def flops_per_token(cls, shape: ModelShape, options: Options) -> int:
        return 2 * options.kernel * shape.width
