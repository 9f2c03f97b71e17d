"""Gated linear attention: a decay for every token, of its own for each head or each channel of the keys."""

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import logsigmoid

from megaresid.attention.gated_mixer import GatedMixer, GatedOptions
from megaresid.attention.mixer import MIXERS, SideSpec
from megaresid.attention.projections import split_heads, wide
from megaresid.model.presets import ModelShape


class SimpleOptions(GatedOptions):
    use_short_conv: bool = True
    """Whether queries, keys and values each pass a short causal convolution and swish."""
    gate_logit_normalizer: float = Field(default=16, gt=0)
    """tau: the decay is sigmoid(logit)^(1/tau)."""


@MIXERS.register("simple_gla")
class SimpleGatedLinearAttention(GatedMixer):
    """S_t = alpha_t S_{t-1} + k_t v_t^T, o_t = K^-1/2 S_t^T q_t, alpha_t = sigmoid(w . x_t + b)^(1/tau) per head.

    Gated linear attention (Yang et al. 2023, arXiv 2312.06635, equation 3) with a scalar decay for each head, as
    flash-linear-attention's layer of this name has it: a short convolution on q, k and v, tau = 16.

    4 C^2 parameters, 8 C for the convolutions and C + 1 for each head: 4.22 M at width 1024 with 16 heads; with
    expand_k=1, flash-linear-attention's default, 5.27 M.
    """

    citation = "Yang et al. 2023, arXiv 2312.06635"
    fidelity = "reconstructed: the scalar gate and the convolution are flash-linear-attention's"
    Options = SimpleOptions
    decays = "head"

    def __init__(self, shape: ModelShape, options: SimpleOptions, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.normalizer = options.gate_logit_normalizer
        self.gk_proj = nn.Linear(shape.width, self.heads)

    def decay(self, x: torch.Tensor) -> torch.Tensor:
        return logsigmoid(wide(self.gk_proj(x))) / self.normalizer



class Options(GatedOptions):
    gate_logit_normalizer: float = Field(default=16, gt=0)
    """tau: the decay is sigmoid(logit)^(1/tau)."""
    gate_low_rank_dim: int = Field(default=16, ge=1, le=65536)
    """Rank of the matrix that makes the decay's logits."""
    clamp_min: float | None = Field(default=None, lt=0)
    """The least logarithm of a decay; none: no limit."""


@MIXERS.register("gla")
class GatedLinearAttention(GatedMixer):
    """S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = K^-1/2 S_t^T q_t, y = W_o (norm(o) * swish(W_g x)).

    Yang et al. 2023 (arXiv 2312.06635, equation 3 and section 4.4), alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/tau) for each
    channel of the keys, W_1 of 16 rows, tau = 16.

    4 C^2 parameters and 1.5 C gate_low_rank_dim + 0.5 C for the decay: 4.22 M at width 1024.
    """

    citation = "Yang et al. 2023, arXiv 2312.06635"
    fidelity = "reconstructed: an RMS norm of each head where the paper has a LayerNorm, as in the authors' code"
    Options = Options
    decays = "channel"

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.normalizer, self.least = options.gate_logit_normalizer, options.clamp_min
        keys = self.heads * self.sizes(shape, options).keys
        rank = options.gate_low_rank_dim
        self.gk_proj = nn.Sequential(nn.Linear(shape.width, rank, bias=False), nn.Linear(rank, keys))

    def decay(self, x: torch.Tensor) -> torch.Tensor:
        g = logsigmoid(wide(split_heads(self.gk_proj(x), self.heads))) / self.normalizer
        return g if self.least is None else g.clamp_min(self.least)
