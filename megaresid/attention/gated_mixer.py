"""The block that retention, lightning attention, simple GLA and GLA share: they differ in their decay."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from megaresid import spec
from megaresid.attention.activations import ActivationName, activation
from megaresid.attention.cache import Cache
from megaresid.attention.kind import Kind
from megaresid.attention.mixer import Inputs, Side, SideSpec
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
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading, Values


class GatedOptions(spec.Options):
    heads: int | None = Field(default=None, ge=1)
    """Heads; none: those of the model's shape."""
    expand_k: float = Field(default=0.5, gt=0, le=64)
    """Width of the keys of all heads, in widths of the model."""
    expand_v: float = Field(default=1.0, gt=0, le=64)
    """Width of the values of all heads, in widths of the model."""
    feature_map: ActivationName = "identity"
    """A function of queries and keys."""
    use_short_conv: bool = False
    """Whether queries, keys and values each pass a short causal convolution and swish."""
    conv_size: int = Field(default=4, ge=1, le=256)
    """Tokens that the short convolution sees."""
    use_output_gate: bool = True
    """Whether outputs are multiplied by gate_fn(W_g x)."""
    gate_fn: ActivationName = "swish"
    """The function of the output gate."""


class GatedMixer(LinearMixer):
    """y = W_o (norm(o) * gate_fn(W_g x)), with o the recurrence of phi(W_q x), phi(W_k x), W_v x and ``decay``.

    The norm is an RMS norm of each head. No Linear of the block has a bias.
    """

    Options = GatedOptions
    decays: ClassVar[str]
    """``Kind.decay``."""

    def __init__(self, shape: ModelShape, options: GatedOptions, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.heads, keys, values = self.sizes(shape, options)
        self.feature_map = activation(options.feature_map)
        for name, width in (("q", keys), ("k", keys), ("v", values)):
            channels = self.heads * width
            self.add_module(f"{name}_proj", nn.Linear(shape.width, channels, bias=False))
            self.add_module(f"{name}_conv1d", convolution(options.use_short_conv, channels, options.conv_size))
        gated = options.use_output_gate
        self.g_proj = nn.Linear(shape.width, self.heads * values, bias=False) if gated else None
        # flash-linear-attention names the norm by whether it is fused with the gate there.
        self.norm_name = "g_norm_swish_gate" if gated and options.gate_fn == "swish" else "g_norm"
        self.add_module(self.norm_name, OutputNorm(values, act=options.gate_fn))
        self.o_proj = nn.Linear(self.heads * values, shape.width, bias=False)

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        x_q, x_k, x_v = three(x)
        segment = self.segment(side)
        q = self.feature_map(split_heads(self.projected("q", x_q, segment, cache), self.heads))
        k = self.feature_map(split_heads(self.projected("k", x_k, segment, cache), self.heads))
        v = split_heads(self.projected("v", x_v, segment, cache), self.heads)
        q, k = self.placed(q, k, cache)
        o = self.recur(q, k, v, self.decay(x_k), segment=segment, cache=cache)
        o = self.get_submodule(self.norm_name)(o, self.gate(x_v))
        return self.o_proj(o.flatten(-2)), side

    def gate(self, x_v: torch.Tensor) -> torch.Tensor | None:
        """What the norm of the output is gated by, [B, T, H, V] before the activation."""
        return None if self.g_proj is None else split_heads(self.g_proj(x_v), self.heads)

    def diagnose(self, x: Inputs, side: Side) -> Mapping[str, Reading]:
        _, x_k, x_v = three(x)
        readings = {} if self.decays == "constant" else {"decay": decay_reading(self.decay(x_k))}
        gate = self.gate(x_v)
        if gate is not None:
            factor = self.get_submodule(self.norm_name).factor(wide(gate))
            readings["output_gate"] = Values(factor.mean((0, 1)))
        return readings

    def placed(
        self, q: torch.Tensor, k: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k [B, T, H, K] with their positions, where a mixer has such."""
        return q, k

    def decay(self, x: torch.Tensor) -> torch.Tensor:
        """The logarithm g of the decay for the tokens x [B, T, C], as ``recurrence`` takes it."""
        raise NotImplementedError

    @classmethod
    def sizes(cls, shape: ModelShape, options: GatedOptions) -> Sizes:
        return head_sizes(cls.name, shape, options.heads, options.expand_k, options.expand_v)

    @classmethod
    def check(cls, shape: ModelShape, options: GatedOptions) -> None:
        cls.sizes(shape, options)

    @classmethod
    def kinds(cls, shape: ModelShape, options: GatedOptions) -> frozenset[Kind]:
        _, keys, values = cls.sizes(shape, options)
        return frozenset({Kind(cls.decays, False, keys, values)})
