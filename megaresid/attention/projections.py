"""What the linear mixers have in common around the recurrence: inputs, heads, and where a call goes on."""

import math
from typing import NamedTuple

import torch
from torch import nn

from megaresid.attention.cache import Cache
from megaresid.attention.kind import recurrence_flops
from megaresid.attention.mixer import SEGMENT, Inputs, Mixer
from megaresid.attention.recurrence import recurrence
from megaresid.attention.short_convolution import ShortConvolution
from megaresid.errors import UserError
from megaresid.model.presets import ModelShape
from megaresid.readings import Values
from megaresid.spec import Options


class LinearMixer(Mixer):
    """A mixer around ``recurrence``, which runs with ``heads`` heads.

    Of three inputs (x_q, x_k, x_v), q comes from x_q; k and what says how long a key is kept or how strongly it is
    written (decay, beta) from x_k; v and the output gate from x_v.
    """

    ways = True
    reads = (SEGMENT,)
    decodes = True
    heads: int

    def recur(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor | None = None,
        beta: torch.Tensor | None = None,
        *,
        scale: float | None = None,
        segment: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """The outputs [B, T, H, V] of ``recurrence``, whose state goes on where the last call with the cache ended.

        The state in the cache belongs to the document of the last token before: another one starts from zero.
        """
        state = None if cache is None else cache.tensors.get("state")
        if state is not None and segment is not None:
            same = segment[:, 0] == cache.tensors["document"]
            state = state.masked_fill(~same[:, None, None, None], 0)
        o, state = recurrence(q, k, v, g, beta, scale=scale, state=state, segment=segment)
        if cache is not None:
            cache.tensors["state"] = state
            if segment is not None:
                cache.tensors["document"] = segment[:, -1].clone()
        return o

    def projected(
        self, name: str, x: torch.Tensor, segment: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        """x [B, T, C] through the modules ``<name>_proj`` and ``<name>_conv1d``."""
        tail = None if cache is None else cache.inside(f"{name}_conv1d")
        return self.get_submodule(f"{name}_conv1d")(self.get_submodule(f"{name}_proj")(x), segment, tail)

    @classmethod
    def flops_per_token(cls, shape: ModelShape, options: Options) -> int:
        """A multiply-add for each weight of a linear map and of a short convolution, and the recurrence."""
        with torch.device("meta"):  # only the sizes of the weights are asked for
            mixer = cls(shape, options, 0)
        maps = [module for module in mixer.modules() if isinstance(module, nn.Linear | ShortConvolution)]
        recurrences = sum(recurrence_flops(kind, mixer.heads) for kind in cls.kinds(shape, options))
        return 2 * sum(module.weight.numel() for module in maps) + recurrences


class Sizes(NamedTuple):
    """Heads, and the widths of a head's keys and values."""

    heads: int
    keys: int
    values: int


def head_sizes(mixer: str, shape: ModelShape, heads: int | None, expand_k: float = 1.0, expand_v: float = 1.0) -> Sizes:
    """Of a mixer whose keys are ``expand_k`` and whose values are ``expand_v`` times as wide as the model, over all
    heads. Raises UserError, with the ``mixer``'s name, where the heads do not divide one of them."""
    heads = shape.heads if heads is None else heads
    keys = head_width(mixer, shape, heads, "expand_k", expand_k)
    return Sizes(heads, keys, head_width(mixer, shape, heads, "expand_v", expand_v))


def head_width(mixer: str, shape: ModelShape, heads: int, option: str, expand: float) -> int:
    """Width of each of ``heads`` that are together ``expand`` times as wide as the model. Raises UserError, with the
    names of the ``mixer`` and of its ``option``, where there is none."""
    width = shape.width * expand
    if not math.isclose(width, round(width)) or round(width) % heads:
        raise UserError(
            f"attention {mixer!r}: {option}={expand:g} of width {shape.width} is {width:g}, which {heads} heads do not "
            f"divide: change heads or {option}"
        )
    return round(width) // heads


def three(x: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs of q, k and v, which may be one."""
    return x if isinstance(x, tuple) else (x, x, x)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, H D] -> [B, T, H, D]."""
    return x.unflatten(-1, (heads, -1))


def wide(x: torch.Tensor) -> torch.Tensor:
    """fp32 or wider: for what makes a decay or a beta."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def decay_reading(g: torch.Tensor) -> Values:
    """The decays exp(g) of each token and head [B, T, H]; of channels [B, T, H, K] each one's mean over the tokens."""
    decay = wide(g).exp()
    return Values(decay if decay.dim() == 3 else decay.mean((0, 1)))


class NoConvolution(nn.Module):
    """Stands where a mixer could have a short convolution: gives its input back."""

    def forward(
        self, x: torch.Tensor, segment: torch.Tensor | None = None, cache: Cache | None = None
    ) -> torch.Tensor:
        return x


def convolution(use: bool, channels: int, kernel: int, act: str = "swish") -> ShortConvolution | NoConvolution:
    return ShortConvolution(channels, kernel, act) if use else NoConvolution()

