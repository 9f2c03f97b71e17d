"""HGRN2: gated linear attention whose keys are what its decay leaves over."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import logsigmoid, silu

from megaresid import spec
from megaresid.attention.cache import Cache
from megaresid.attention.kind import Kind
from megaresid.attention.mixer import MIXERS, Inputs, Side, SideSpec
from megaresid.attention.output_norm import OutputNorm
from megaresid.attention.projections import (
    LinearMixer,
    Sizes,
    convolution,
    decay_reading,
    head_sizes,
    split_heads,
    three,
    wide,
)
from megaresid.errors import UserError
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading


class Options(spec.Options):
    heads: int | None = Field(default=None, ge=1)
    """Heads; none: those of the model's shape."""
    expand_ratio: int | None = Field(default=None, ge=1, le=65536)
    """Width of a head, instead of the number of heads: the numbers in the state for each of its values."""
    lower_bound: Literal["linear"] | None = "linear"
    """What f is at least in layer l of L: l / L; none: 0."""
    use_short_conv: bool = False
    """Whether queries, gates and values each pass a short causal convolution, without activation."""
    conv_size: int = Field(default=4, ge=1, le=256)
    """Tokens that the short convolution sees."""


@MIXERS.register("hgrn2")
class HGRN2(LinearMixer):
    """S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T, o_t = K^-1/2 S_t^T swish(q_t), f_t = b + (1 - b) sigmoid(W_f x_t).

    Qin et al. 2024 (arXiv 2404.07904, section 3.2); y = W_o norm(o), an RMS norm over all heads. The lower bound b of a
    layer grows with the depth. In the paper it is learned, by a softmax and a cumulative sum over the layers; here it
    stays at the values where that starts.

    4 C^2 parameters: 4.20 M at width 1024.
    """

    citation = "Qin et al. 2024, arXiv 2404.07904"
    fidelity = "reconstructed: the lower bounds keep their initial values instead of being learned over all layers"
    Options = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.heads = sizes_of(shape, options).heads
        self.bound = layer / shape.layers if options.lower_bound == "linear" else 0.0
        for name in ("q", "f", "i"):
            self.add_module(f"{name}_proj", nn.Linear(shape.width, shape.width, bias=False))
            short = convolution(options.use_short_conv, shape.width, options.conv_size, act="identity")
            self.add_module(f"{name}_conv1d", short)
        self.g_norm = OutputNorm(shape.width)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        """q of x_q, f of x_k, i of x_v."""
        x_q, x_k, x_v = three(x)
        segment = self.segment(side)
        q = silu(split_heads(self.projected("q", x_q, segment, cache), self.heads))
        i = split_heads(self.projected("i", x_v, segment, cache), self.heads)
        k, g = self.input_and_decay(self.logits(x_k, segment, cache))
        o = self.recur(q, k.to(i.dtype), i, g, segment=segment, cache=cache)
        return self.o_proj(self.g_norm(o.flatten(-2))), side

    def logits(self, x_k: torch.Tensor, segment: torch.Tensor | None, cache: Cache | None = None) -> torch.Tensor:
        """W_f x [B, T, H, D]."""
        return split_heads(self.projected("f", x_k, segment, cache), self.heads)

    def input_and_decay(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """1 - f and log f [B, T, H, D], both exact where sigmoid is near 0 or 1."""
        logits = wide(logits)
        k = (1 - self.bound) * torch.sigmoid(-logits)
        # Without a bound 1 - k may round to 0.
        return k, torch.log1p(-k) if self.bound else logsigmoid(logits)

    def diagnose(self, x: Inputs, side: Side) -> Mapping[str, Reading]:
        _, x_k, _ = three(x)
        _, g = self.input_and_decay(self.logits(x_k, self.segment(side)))
        return {"decay": decay_reading(g)}

    @classmethod
    def check(cls, shape: ModelShape, options: Options) -> None:
        sizes_of(shape, options)

    @classmethod
    def kinds(cls, shape: ModelShape, options: Options) -> frozenset[Kind]:
        _, keys, values = sizes_of(shape, options)
        return frozenset({Kind("channel", False, keys, values)})


def sizes_of(shape: ModelShape, options: Options) -> Sizes:
    if options.expand_ratio is None:
        return head_sizes("hgrn2", shape, options.heads)
    heads, rest = divmod(shape.width, options.expand_ratio)
    if rest or options.heads not in (None, heads):
        wanted = "a multiple of" if options.heads is None else f"{options.heads} times"
        raise UserError(
            f"attention 'hgrn2': expand_ratio={options.expand_ratio} is the width of a head, and width {shape.width} "
            f"is not {wanted} it: change it, or leave it out"
        )
    return head_sizes("hgrn2", shape, heads)
