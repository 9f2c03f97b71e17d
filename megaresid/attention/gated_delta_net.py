"""Gated DeltaNet."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import softplus

from megaresid import spec
from megaresid.attention.delta_mixer import DeltaMixer, DeltaSizes
from megaresid.attention.mixer import MIXERS, SideSpec
from megaresid.attention.projections import split_heads, wide
from megaresid.errors import UserError
from megaresid.model.init import LogUniform, Rule, TimeStep
from megaresid.model.presets import ModelShape


class GatedOptions(spec.Options):
    """What gated DeltaNet and Kimi delta attention both have."""

    heads: int | None = Field(None, ge=1)
    """Of q and k. None: as many as the model's."""
    head_dim: int | None = Field(None, ge=1, le=65536)
    """Width of a head's keys. None: the model's width / heads."""
    expand_v: float = Field(1.0, gt=0, le=64)
    """Width of a head's values, by head_dim."""
    num_v_heads: int | None = Field(None, ge=1, le=65536)
    """Heads of v, a multiple of heads, of which several share a key. None: as many as heads."""
    use_short_conv: bool = True
    """Whether q, k and v pass a short causal convolution."""
    conv_size: int = Field(4, ge=1, le=256)
    """Tokens that the convolution sees."""
    conv_bias: bool = False
    """Whether the convolutions add a number for every channel."""
    allow_neg_eigval: bool = False
    """Whether beta goes to 2 instead of 1 (arXiv 2411.12537)."""
    norm_eps: float = Field(1e-5, gt=0)
    """Of the norm of a head's output."""


class Options(GatedOptions):
    use_gate: bool = True
    """Whether the output is gated by an activation of W x."""
    output_gate_activation: Literal["swish", "silu", "sigmoid"] = "swish"
    """The function of the output gate."""


def gated_sizes(name: str, shape: ModelShape, options: GatedOptions) -> DeltaSizes:
    """Raises UserError, with the mixer's ``name``, where the options do not fit each other or the shape."""
    heads = shape.heads if options.heads is None else options.heads
    if options.head_dim is None and shape.width % heads:
        raise UserError(
            f"attention {name!r}: width {shape.width} is not divisible by heads={heads}: change heads or give head_dim"
        )
    keys = shape.width // heads if options.head_dim is None else options.head_dim
    values = keys * options.expand_v
    if not math.isclose(values, round(values)):
        raise UserError(
            f"attention {name!r}: expand_v={options.expand_v:g} of head_dim {keys} is {values:g}, not a whole number: "
            "change one of them"
        )
    value_heads = heads if options.num_v_heads is None else options.num_v_heads
    if value_heads % heads:
        raise UserError(
            f"attention {name!r}: num_v_heads={value_heads} is not a multiple of heads={heads}: change one of them"
        )
    return DeltaSizes(heads, value_heads, keys, round(values))


@MIXERS.register("gated_delta_net")
class GatedDeltaNet(DeltaMixer):
    """S~_t = alpha_t S_{t-1}, S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T, o_t = K^-1/2 S_t^T q_t per head.

    Yang, Kautz & Hatamizadeh 2024 (arXiv 2412.06464, equation 10): DeltaNet whose state decays by Mamba-2's
    alpha_t = exp(-exp(A_log) softplus(a x_t + dt_bias)), one number a head, and whose output norm is gated by
    SiLU(W x). At width 1024 with 16 heads 5.29 M parameters: softmax attention's 4 C^2, the gate's C^2 and 1% more;
    heads=12 with head_dim=64 has 3.97 M, and expand_v=2 beside them the paper's 6 C^2.
    """

    citation = "Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464"
    fidelity = "reconstructed: values are as wide as keys by default, instead of twice"
    decay = "head"
    Options = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering, gate_act=options.output_gate_activation)
        self.a_proj = nn.Linear(shape.width, self.heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.g_proj = nn.Linear(shape.width, self.v_proj.out_features, bias=False) if options.use_gate else None

    def parameter_rules(self) -> dict[str, Rule]:
        return {
            "A_log": Rule(LogUniform(0, 16), decay=False, fp32=True),
            "dt_bias": Rule(TimeStep(), decay=False, fp32=True),
        }

    def log_decay(self, x_k: torch.Tensor) -> torch.Tensor:
        """[B, T, H] in fp32 or wider, at most 0."""
        return -wide(self.A_log).exp() * softplus(wide(self.a_proj(x_k)) + self.dt_bias)

    def gate(self, x_v: torch.Tensor) -> torch.Tensor | None:
        return None if self.g_proj is None else split_heads(self.g_proj(x_v), self.heads)

    @classmethod
    def sizes(cls, shape: ModelShape, options: Options) -> DeltaSizes:
        return gated_sizes(cls.name, shape, options)
