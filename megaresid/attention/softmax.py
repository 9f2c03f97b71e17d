"""Causal softmax attention: multi-head, grouped-query and multi-query, over all tokens or a sliding window."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from megaresid import spec
from megaresid.attention.cache import Cache
from megaresid.attention.causal_attention import causal_attention
from megaresid.attention.keys_values import carried, tokens_seen
from megaresid.attention.mixer import MIXERS, SEGMENT, Inputs, Mixer, Side, SideSpec
from megaresid.attention.output_norm import OutputNorm
from megaresid.attention.projections import split_heads, three
from megaresid.attention.rotary import rotate
from megaresid.errors import UserError
from megaresid.model.presets import ModelShape


class Options(spec.Options):
    heads: int | None = Field(None, ge=1)
    """Heads; none: those of the model's shape."""
    kv_heads: int | None = Field(None, ge=1)
    """Heads of keys and values, each shared by heads/kv_heads of the queries; 1 is multi-query, none as many."""
    positions: Literal["learned", "rope"] | None = "learned"
    """How tokens are told apart: the model's learned embeddings, rotation of q and k, or not at all."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotation's wavelengths."""
    qk_norm: bool = False
    """RMS norms of every head's q and k, with weights."""
    window: int | None = Field(None, ge=1)
    """How many tokens a token sees, itself included; none: all before it."""
    bias: bool = True
    """Of the four projections, as GPT-2 has them."""


@MIXERS.register("softmax")
class Softmax(Mixer):
    """o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(D)) v_s per head of width D = C / heads.

    Vaswani et al. 2017 (arXiv 1706.03762, equation 1) with GPT-2's causal mask and biases. Keys and values may be
    shared by several heads (Shazeer 2019, arXiv 1911.02150; Ainslie et al. 2023, arXiv 2305.13245), q and k turned
    (``rotary.py``), and tokens seen only in a window (Beltagy et al. 2020, arXiv 2004.05150). q and k may be normed:
    by their length in Henry et al. 2020 (arXiv 2010.04245), by a LayerNorm in Dehghani et al. 2023 (arXiv 2302.05442),
    here by an RMS norm over the width of a head, with weights that all heads share. q is made of x_q, k of x_k, v of
    x_v.
    """

    citation = "Vaswani et al. 2017, arXiv 1706.03762"
    fidelity = "exact"
    ways = True
    reads = (SEGMENT,)
    decodes = True
    Options = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.heads, self.kv_heads = head_counts(shape, options)
        self.window, self.dropout = options.window, shape.dropout
        self.theta = options.rope_theta if options.positions == "rope" else None
        kv_width = self.kv_width(shape, options)
        self.q_proj = nn.Linear(shape.width, shape.width, bias=options.bias)
        self.k_proj = nn.Linear(shape.width, kv_width, bias=options.bias)
        self.v_proj = nn.Linear(shape.width, kv_width, bias=options.bias)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=options.bias)
        size = shape.width // self.heads
        self.q_norm, self.k_norm = (OutputNorm(size), OutputNorm(size)) if options.qk_norm else (None, None)

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        x_q, x_k, x_v = three(x)
        return self.attend(self.q_proj(x_q), self.k_proj(x_k), self.v_proj(x_v), self.segment(side), cache), side

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segment: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """From the projections, [B, T, heads * D] each, to the output [B, T, C]."""
        q, k, v = split_heads(q, self.heads), split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.theta is not None:
            start = tokens_seen(cache)
            positions = torch.arange(start, start + q.shape[1], device=q.device)
            q, k = rotate(q, positions, self.theta), rotate(k, positions, self.theta)
        if cache is not None:
            tokens = {"k": k, "v": v} | ({} if segment is None else {"segment": segment})
            tokens = carried(cache, tokens, self.window)
            k, v, segment = tokens["k"], tokens["v"], tokens.get("segment")
        if self.kv_heads < self.heads:
            k, v = (z.repeat_interleave(self.heads // self.kv_heads, 2) for z in (k, v))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # [B, heads, T, D]
        attention_dropout = self.dropout if self.training else 0.0
        o = causal_attention(q, k, v, self.window, segment, attention_dropout)
        return self.o_proj(o.transpose(1, 2).flatten(-2))

    @classmethod
    def kv_width(cls, shape: ModelShape, options: Options) -> int:
        """Of the keys, and of the values, of a token."""
        heads, kv_heads = head_counts(shape, options)
        return shape.width // heads * kv_heads

    @classmethod
    def check(cls, shape: ModelShape, options: Options) -> None:
        heads, kv_heads = head_counts(shape, options)
        if shape.width % heads:
            raise UserError(f"attention {cls.name!r}: heads={heads} does not divide width {shape.width}: change one")
        if heads % kv_heads:
            raise UserError(f"attention {cls.name!r}: kv_heads={kv_heads} does not divide heads {heads}: change one")
        if options.positions == "rope" and (size := shape.width // heads) % 2:
            raise UserError(
                f"attention {cls.name!r}: positions=rope turns pairs, and a head's width is {size}, odd: change heads"
            )

    @classmethod
    def needs_positions(cls, options: Options) -> bool:
        return options.positions == "learned"

    @classmethod
    def flops_per_token(cls, shape: ModelShape, options: Options) -> int:
        """A causal token sees (context + 1) / 2 tokens on average, itself included, or the mean of its window; that
        documents hide some is not counted."""
        projections = 2 * shape.width * (2 * shape.width + 2 * cls.kv_width(shape, options))
        seen = min(options.window or shape.context, shape.context)
        pairs = seen * (seen + 1) // 2 + (shape.context - seen) * seen
        return projections + 2 * 2 * shape.width * pairs // shape.context


def head_counts(shape: ModelShape, options: Options) -> tuple[int, int]:
    """Of the queries, and of keys and values."""
    heads = options.heads or shape.heads
    return heads, options.kv_heads or heads
