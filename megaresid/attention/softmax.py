"""Causal multi-head softmax attention."""

import torch
from torch import nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from megaresid.attention.cache import Cache
from megaresid.attention.mixer import MIXERS, Inputs, Mixer, Side, SideSpec
from megaresid.model.presets import ModelShape
from megaresid.spec import Options


@MIXERS.register("softmax")
class Softmax(Mixer):
    """o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(D)) v_s per head of width D = C / heads.

    Vaswani et al. 2017 (arXiv 1706.03762, equation 1) with GPT-2's causal mask and biases. Computed by PyTorch's
    ``scaled_dot_product_attention``, which never holds the T x T scores where a fused kernel exists.
    """

    citation = "Vaswani et al. 2017, arXiv 1706.03762"
    ways = True

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.heads, self.dropout = shape.heads, shape.dropout
        self.q_proj = nn.Linear(shape.width, shape.width)
        self.k_proj = nn.Linear(shape.width, shape.width)
        self.v_proj = nn.Linear(shape.width, shape.width)
        self.o_proj = nn.Linear(shape.width, shape.width)

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        x_q, x_k, x_v = x if isinstance(x, tuple) else (x, x, x)
        return self.attend(self.q_proj(x_q), self.k_proj(x_k), self.v_proj(x_v)), side

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """From the projections [B, T, C] to the output [B, T, C]."""
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))  # [B, heads, T, D]
        attention_dropout = self.dropout if self.training else 0.0
        o = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=attention_dropout)
        y = self.o_proj(o.transpose(1, 2).flatten(-2))
        return dropout(y, self.dropout, self.training)

    @classmethod
    def needs_positions(cls, options: Options) -> bool:
        return True

    @classmethod
    def flops_per_token(cls, shape: ModelShape, options: Options) -> int:
        projections = 4 * 2 * shape.width**2
        seen = (shape.context + 1) / 2  # a causal token sees this many tokens on average, itself included
        return int(projections + 2 * 2 * shape.width * seen)
