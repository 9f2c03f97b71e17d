"""Linear attention with a fixed feature map."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import pad

from megaresid import spec
from megaresid.attention.activations import activation
from megaresid.attention.cache import Cache
from megaresid.attention.kind import Kind
from megaresid.attention.mixer import MIXERS, Inputs, Side, SideSpec
from megaresid.attention.output_norm import OutputNorm
from megaresid.attention.projections import LinearMixer, Sizes, head_sizes, split_heads, three
from megaresid.errors import UserError
from megaresid.model.presets import ModelShape

POSITIVE = ("elu_plus_one", "relu")
EPSILON = 1e-6  # of the normaliser, as in the code of the paper's authors; q and k are not scaled there


class Options(spec.Options):
    heads: int | None = Field(default=None, ge=1)
    """Heads; none: those of the model's shape."""
    expand_k: float = Field(default=1.0, gt=0, le=64)
    """Width of the keys of all heads, in widths of the model."""
    expand_v: float = Field(default=1.0, gt=0, le=64)
    """Width of the values of all heads, in widths of the model."""
    feature_map: Literal["elu_plus_one", "relu", "silu", "identity"] = "elu_plus_one"
    """The function phi of queries and keys."""
    normalize: bool | None = None
    """Whether outputs are divided by phi(q_t) . sum_s phi(k_s); none: where phi is never negative."""
    output_norm: Literal["rmsnorm", "identity"] | None = None
    """The norm of a head's output; none: rmsnorm where it is not normalised (it would undo the division)."""

    @property
    def normalized(self) -> bool:
        return self.feature_map in POSITIVE if self.normalize is None else self.normalize

    @property
    def normed(self) -> bool:
        return not self.normalized if self.output_norm is None else self.output_norm == "rmsnorm"


@MIXERS.register("linear_attention")
class LinearAttention(LinearMixer):
    """o_t = sum_{s<=t} (phi(q_t) . phi(k_s)) v_s / (sum_{s<=t} phi(q_t) . phi(k_s) + epsilon) per head, epsilon = 1e-6.

    Katharopoulos et al. 2020 (arXiv 2006.16236, equations 8 and 9, without the epsilon). The denominator is the output
    for a column of ones beside v, so that the state carries it. Without it the scale is K^-1/2, and an RMS norm of each
    head's output does its work (Qin et al. 2022, arXiv 2210.10340).

    4 C^2 parameters: 4.19 M at width 1024.
    """

    citation = "Katharopoulos et al. 2020, arXiv 2006.16236"
    fidelity = "exact"
    Options = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.heads, keys, values = sizes_of(shape, options)
        self.feature_map, self.normalized = activation(options.feature_map), options.normalized
        self.q_proj = nn.Linear(shape.width, self.heads * keys, bias=False)
        self.k_proj = nn.Linear(shape.width, self.heads * keys, bias=False)
        self.v_proj = nn.Linear(shape.width, self.heads * values, bias=False)
        self.norm = OutputNorm(values) if options.normed else nn.Identity()
        self.o_proj = nn.Linear(self.heads * values, shape.width, bias=False)

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        x_q, x_k, x_v = three(x)
        q = self.feature_map(split_heads(self.q_proj(x_q), self.heads))
        k = self.feature_map(split_heads(self.k_proj(x_k), self.heads))
        v = split_heads(self.v_proj(x_v), self.heads)
        if self.normalized:
            o = self.recur(q, k, pad(v, (0, 1), value=1.0), scale=1.0, segment=self.segment(side), cache=cache)
            o = o[..., :-1] / (o[..., -1:] + EPSILON)
        else:
            o = self.recur(q, k, v, segment=self.segment(side), cache=cache)
        return self.o_proj(self.norm(o).flatten(-2)), side

    @classmethod
    def check(cls, shape: ModelShape, options: Options) -> None:
        sizes_of(shape, options)
        if options.normalized and options.feature_map not in POSITIVE:
            raise UserError(
                f"attention 'linear_attention': normalize=true divides by a sum that may be zero or negative with "
                f"feature_map={options.feature_map}: leave it out, or choose one of {', '.join(POSITIVE)}"
            )

    @classmethod
    def kinds(cls, shape: ModelShape, options: Options) -> frozenset[Kind]:
        _, keys, values = sizes_of(shape, options)
        return frozenset({Kind("none", False, keys, values + options.normalized)})


def sizes_of(shape: ModelShape, options: Options) -> Sizes:
    return head_sizes("linear_attention", shape, options.heads, options.expand_k, options.expand_v)
