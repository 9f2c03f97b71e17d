"""Kimi delta attention."""

from functools import partial

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import softplus

from megaresid.attention.delta_mixer import DeltaMixer, DeltaSizes
from megaresid.attention.gated_delta_net import GatedOptions, gated_sizes
from megaresid.attention.mixer import MIXERS, SideSpec
from megaresid.attention.projections import split_heads, wide
from megaresid.model.init import Constant, LogUniform, Rule, TimeStep
from megaresid.model.presets import ModelShape


class Options(GatedOptions):
    lower_bound: float | None = Field(None, lt=0)
    """Least natural logarithm b of a token's decay, which is then b sigmoid(exp(A_log) (W2 W1 x + dt_bias)), and A_log
    starts at 0; None: no bound."""


def unbounded(logits: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """-rate softplus(logits), below 0."""
    return -rate * softplus(logits)


def bounded(logits: torch.Tensor, rate: torch.Tensor, least: float) -> torch.Tensor:
    """least sigmoid(rate logits), between ``least`` and 0."""
    return least * torch.sigmoid(rate * logits)


@MIXERS.register("kda")
class KimiDeltaAttention(DeltaMixer):
    """S~_t = diag(alpha_t) S_{t-1}, S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T, o_t = K^-1/2 S_t^T q_t per head.

    Kimi Team 2025 (arXiv 2510.26692, equation 1): gated DeltaNet with a decay for every channel of the keys,
    alpha_t = exp(-exp(A_log) softplus(W2 W1 x_t + dt_bias)), A_log one number a head; the gate of the output norm,
    sigmoid(U2 U1 x + b), is of low rank too, both of the rank of a head's values. At width 1024 with 16 heads 4.49 M
    parameters, softmax attention's 4 C^2 and 7% more.
    """

    citation = "Kimi Team 2025, arXiv 2510.26692"
    fidelity = "exact"
    decay = "channel"
    Options = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering, gate_act="sigmoid")
        _, _, keys, rank = self.sizes(shape, options)
        channels = self.heads * keys
        self.f_proj = nn.Sequential(
            nn.Linear(shape.width, rank, bias=False), nn.Linear(rank, channels, bias=False)
        )
        self.g_proj = nn.Sequential(
            nn.Linear(shape.width, rank, bias=False), nn.Linear(rank, self.v_proj.out_features)
        )
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(channels))
        least = options.lower_bound
        self.decay_of = unbounded if least is None else partial(bounded, least=least)
        self.start = LogUniform(1, 16) if least is None else Constant(0.0)

    def parameter_rules(self) -> dict[str, Rule]:
        return {
            "A_log": Rule(self.start, decay=False, fp32=True),
            "dt_bias": Rule(TimeStep(), decay=False, fp32=True),
        }

    def log_decay(self, x_k: torch.Tensor) -> torch.Tensor:
        """[B, T, H, K] in fp32 or wider, at most 0."""
        logits = split_heads(wide(self.f_proj(x_k)) + self.dt_bias, self.heads)
        return self.decay_of(logits, wide(self.A_log).exp()[:, None])

    def gate(self, x_v: torch.Tensor) -> torch.Tensor:
        return split_heads(self.g_proj(x_v), self.heads)

    @classmethod
    def sizes(cls, shape: ModelShape, options: Options) -> DeltaSizes:
        return gated_sizes(cls.name, shape, options)
