"""What the mixers with a delta rule share: DeltaNet, gated DeltaNet, Kimi delta attention."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import nn

from megaresid.attention.activations import activation
from megaresid.attention.cache import Cache
from megaresid.attention.kind import Kind
from megaresid.attention.mixer import Inputs, Side, SideSpec
from megaresid.attention.output_norm import OutputNorm
from megaresid.attention.projections import LinearMixer, decay_reading, split_heads, three, wide
from megaresid.attention.short_convolution import ShortConvolution
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading, Values
from megaresid.spec import Options


class DeltaSizes(NamedTuple):
    """Heads of the keys and of the values, and the widths of one: value head i has the key of head
    i // (value_heads / key_heads)."""

    key_heads: int
    value_heads: int
    keys: int
    values: int


def l2_norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis, computed in fp32 or wider; in x's dtype."""
    y = wide(x)
    return (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def sum_norm(x: torch.Tensor) -> torch.Tensor:
    """x / max(sum(|x|), 1e-6) over the last axis, computed in fp32 or wider; in x's dtype."""
    y = wide(x)
    return (y / y.abs().sum(-1, keepdim=True).clamp_min(1e-6)).to(x.dtype)


class Elementwise(nn.Module):
    """An activation in the place of a short convolution: it has nothing to carry from token to token."""

    def __init__(self, act: str):
        super().__init__()
        self.act = activation(act)

    def forward(
        self, x: torch.Tensor, segment: torch.Tensor | None = None, cache: Cache | None = None
    ) -> torch.Tensor:
        return self.act(x)


class DeltaMixer(LinearMixer):
    """q, k and v through short convolutions, q and k normed, the delta rule, a norm of each head, an output projection.

    A subclass reads its ``sizes`` off its options and says its decay and its gate. ``qk_act`` stands in the place of
    SiLU after q and k, ``gate_act`` of the gate's; without ``has_beta`` every token is written with full strength.
    """

    decay: Literal["none", "head", "channel"] = "none"

    def __init__(
        self,
        shape: ModelShape,
        options: Options,
        layer: int,
        entering: SideSpec = (),
        *,
        qk_act: str = "silu",
        qk_norm: Callable[[torch.Tensor], torch.Tensor] = l2_norm,
        gate_act: str = "silu",
        has_beta: bool = True,
    ):
        super().__init__(shape, options, layer, entering)
        self.key_heads, self.heads, head_keys, head_values = self.sizes(shape, options)
        keys, values = self.key_heads * head_keys, self.heads * head_values
        self.q_proj = nn.Linear(shape.width, keys, bias=False)
        self.k_proj = nn.Linear(shape.width, keys, bias=False)
        self.v_proj = nn.Linear(shape.width, values, bias=False)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            ShortConvolution(channels, options.conv_size, act, options.conv_bias)
            if options.use_short_conv
            else Elementwise(act)
            for channels, act in ((keys, qk_act), (keys, qk_act), (values, "silu"))
        )
        self.qk_norm = qk_norm
        self.b_proj = nn.Linear(shape.width, self.heads, bias=False) if has_beta else None
        self.strongest = 2.0 if options.allow_neg_eigval else 1.0
        self.o_norm = OutputNorm(head_values, options.norm_eps, gate_act)
        self.o_proj = nn.Linear(values, shape.width, bias=False)

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        x_q, x_k, x_v = three(x)
        segment = self.segment(side)
        q = self._shared(self.projected("q", x_q, segment, cache))
        k = self._shared(self.projected("k", x_k, segment, cache))
        v = split_heads(self.projected("v", x_v, segment, cache), self.heads)
        o = self.recur(q, k, v, self.log_decay(x_k), self.beta(x_k), segment=segment, cache=cache)
        return self.o_proj(self.o_norm(o, self.gate(x_v)).flatten(-2)), side

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        """q or k, normed: from the heads of the keys to those of the values, [B, T, H, K]."""
        x = self.qk_norm(split_heads(x, self.key_heads))
        return x[:, :, :, None].expand(-1, -1, -1, self.heads // self.key_heads, -1).flatten(2, 3)

    def beta(self, x_k: torch.Tensor) -> torch.Tensor:
        """How strongly a token is written, [B, T, H] in fp32 or wider: of I - beta k k^T the eigenvalue along k is
        1 - beta, so that up to 2 it is between -1 and 1 (Grazzi et al. 2024, arXiv 2411.12537)."""
        if self.b_proj is None:
            return wide(x_k.new_full((*x_k.shape[:2], self.heads), self.strongest))
        return self.strongest * wide(self.b_proj(x_k)).sigmoid()

    def log_decay(self, x_k: torch.Tensor) -> torch.Tensor | None:
        """The natural logarithm of the decay, as ``recurrence`` takes it."""
        return None

    def gate(self, x_v: torch.Tensor) -> torch.Tensor | None:
        """What the norm of the output is gated by, [B, T, H, V] before the activation."""
        return None

    def diagnose(self, x: Inputs, side: Side) -> Mapping[str, Reading]:
        _, x_k, x_v = three(x)
        readings, g, gate = {}, self.log_decay(x_k), self.gate(x_v)
        if g is not None:
            readings["decay"] = decay_reading(g)
        if self.b_proj is not None:
            readings["beta"] = Values(self.beta(x_k))
        if gate is not None:
            readings["output_gate"] = Values(self.o_norm.factor(wide(gate)).mean((0, 1)))
        return readings

    @classmethod
    def sizes(cls, shape: ModelShape, options: Options) -> DeltaSizes:
        """Raises UserError where the options do not fit the shape."""
        raise NotImplementedError

    @classmethod
    def check(cls, shape: ModelShape, options: Options) -> None:
        cls.sizes(shape, options)

    @classmethod
    def kinds(cls, shape: ModelShape, options: Options) -> frozenset[Kind]:
        sizes = cls.sizes(shape, options)
        return frozenset({Kind(cls.decay, True, sizes.keys, sizes.values)})
