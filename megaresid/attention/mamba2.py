"""The mixing of Mamba-2: a state space whose decay and input strength are one number per token and head."""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import silu, softplus

from megaresid import spec
from megaresid.attention.cache import Cache
from megaresid.attention.kind import Kind
from megaresid.attention.mixer import MIXERS, Inputs, Side, SideSpec
from megaresid.attention.output_norm import OutputNorm
from megaresid.attention.projections import LinearMixer, decay_reading, head_width, split_heads, three, wide
from megaresid.attention.short_convolution import ShortConvolution
from megaresid.model.init import Constant, LogUniform, Rule, TimeStep
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading, Values


class Options(spec.Options):
    heads: int | None = Field(default=None, ge=1)
    """Heads; none: those of the model's shape."""
    expand: float = Field(default=1.25, gt=0, le=64)
    """Width of the values of all heads, in widths of the model."""
    state_size: int = Field(default=128, ge=1, le=65536)
    """N: the numbers in the state for each value, the width of B and C."""
    conv_kernel: int = Field(default=4, ge=1, le=256)
    """Tokens that the short convolution sees."""


@MIXERS.register("mamba2")
class Mamba2(LinearMixer):
    """S_t = exp(-exp(A) dt_t) S_{t-1} + dt_t B_t x_t^T, y_t = S_t^T C_t + D x_t per head, dt_t = softplus(w . u_t + b).

    Dao and Gu 2024 (arXiv 2405.21060, sections 2 and 7): x, B and C pass a short convolution with bias and SiLU, all
    heads share B and C, and the output is W_o RMSNorm(y * SiLU(z)) with one norm over all heads.

    In the words of attention C is q, B is k and x is v, and so their parameters are named here. The rows of Mamba-2's
    in_proj are in this order those of g_proj (its z), v_proj, k_proj, q_proj and dt_proj, those of its conv1d v, k and
    q; its out_proj is o_proj.

    3 expand C^2 + 2 N C parameters, H C for dt and 5 (expand C + 2 N) for convolutions: 4.22 M at width 1024 with 16
    heads; with expand=2, Mamba-2's own, 6.58 M.
    """

    citation = "Dao and Gu 2024, arXiv 2405.21060"
    fidelity = "reconstructed: values are 1.25 times as wide as the model instead of twice; one group of B and C"
    Options = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.heads, values = sizes_of(shape, options)
        inner = self.heads * values
        for name, channels in (("q", options.state_size), ("k", options.state_size), ("v", inner)):
            self.add_module(f"{name}_proj", nn.Linear(shape.width, channels, bias=False))
            self.add_module(f"{name}_conv1d", ShortConvolution(channels, options.conv_kernel, bias=True))
        self.g_proj = nn.Linear(shape.width, inner, bias=False)
        self.dt_proj = nn.Linear(shape.width, self.heads, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = OutputNorm(inner)
        self.o_proj = nn.Linear(inner, shape.width, bias=False)

    def parameter_rules(self) -> dict[str, Rule]:
        starts = {"A_log": LogUniform(1, 16), "dt_bias": TimeStep(), "D": Constant(1.0)}
        return {name: Rule(start, decay=False, fp32=True) for name, start in starts.items()}

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        """C of x_q, B and dt of x_k, x and z of x_v."""
        x_q, x_k, x_v = three(x)
        segment = self.segment(side)
        q = self.projected("q", x_q, segment, cache)[:, :, None].expand(-1, -1, self.heads, -1)
        k = self.projected("k", x_k, segment, cache)[:, :, None].expand(-1, -1, self.heads, -1)
        v = split_heads(self.projected("v", x_v, segment, cache), self.heads)
        dt, g = self.step_and_decay(x_k)
        o = self.recur(q, k, (dt[..., None] * v).to(v.dtype), g, scale=1.0, segment=segment, cache=cache)
        y = (o + self.D[:, None] * v).to(v.dtype).flatten(-2)
        return self.o_proj(self.norm(y * self.gate(x_v))), side

    def step_and_decay(self, x_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dt and the natural logarithm of the decay, [B, T, H] in fp32 or wider."""
        dt = softplus(wide(self.dt_proj(x_k)) + self.dt_bias)
        return dt, -wide(self.A_log).exp() * dt

    def gate(self, x_v: torch.Tensor) -> torch.Tensor:
        """SiLU(z) [B, T, H V]."""
        return silu(self.g_proj(x_v))

    def diagnose(self, x: Inputs, side: Side) -> Mapping[str, Reading]:
        """dt is how strongly a token is written, D what goes around the state."""
        _, x_k, x_v = three(x)
        dt, g = self.step_and_decay(x_k)
        return {
            "decay": decay_reading(g),
            "write": Values(dt),
            "skip": Values(self.D),
            "output_gate": Values(wide(self.gate(x_v)).mean((0, 1))),
        }

    @classmethod
    def check(cls, shape: ModelShape, options: Options) -> None:
        sizes_of(shape, options)

    @classmethod
    def kinds(cls, shape: ModelShape, options: Options) -> frozenset[Kind]:
        _, values = sizes_of(shape, options)
        return frozenset({Kind("head", False, options.state_size, values)})


def sizes_of(shape: ModelShape, options: Options) -> tuple[int, int]:
    """Heads, and the width of a head's values."""
    heads = shape.heads if options.heads is None else options.heads
    return heads, head_width("mamba2", shape, heads, "expand", options.expand)
