"""The short causal convolution of the linear mixers."""

import torch
from torch import nn

from megaresid.attention.activations import activation
from megaresid.attention.cache import Cache
from megaresid.model.init import Constant, Rule, Uniform


class ShortConvolution(nn.Module):
    """y_t = act(sum_{j=0}^{kernel-1} w_j x_{t-j} + bias) for each channel: [B, T, C] -> [B, T, C].

    ``weight`` is [C, 1, kernel] in nn.Conv1d's order, w_0 last, as flash-linear-attention's ShortConvolution has it. A
    sum of shifted copies rather than a convolution operator: it takes documents, compiles to one kernel, and
    is faster on a CPU.
    """

    def __init__(self, channels: int, kernel: int = 4, act: str = "swish", bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.kernel, self.act = kernel, activation(act)

    def parameter_rules(self) -> dict[str, Rule]:
        rules = {"weight": Rule(Uniform(self.kernel**-0.5), decay=True), "bias": Rule(Constant(0.0), decay=False)}
        return {name: rules[name] for name, _ in self.named_parameters()}

    def forward(
        self, x: torch.Tensor, segment: torch.Tensor | None = None, cache: Cache | None = None
    ) -> torch.Tensor:
        """``segment`` int32 [B, T]: a token takes nothing from another document. With a ``cache`` x goes on where the
        last call ended."""
        before = self.kernel - 1
        past = _before(x, "x", before, 0, cache)
        documents = None if segment is None else _before(segment, "segment", before, -1, cache)
        length, total = x.shape[1], self.bias
        for place, weight in enumerate(self.weight.squeeze(1).unbind(1)):
            tap = past[:, place : place + length] * weight
            if documents is not None and place < before:
                same = documents[:, place : place + length] == segment
                tap = tap.masked_fill(~same[..., None], 0)
            total = tap if total is None else total + tap
        return self.act(total).to(x.dtype)


def _before(tokens: torch.Tensor, name: str, count: int, missing: int, cache: Cache | None) -> torch.Tensor:
    """``tokens`` [B, T, ...] after the ``count`` that came before them, ``missing`` where there were none."""
    past = None if cache is None else cache.tensors.get(name)
    if past is None:
        past = tokens.new_full((tokens.shape[0], count, *tokens.shape[2:]), missing)
    tokens = torch.cat([past, tokens], 1)
    if cache is not None:
        cache.tensors[name] = tokens[:, tokens.shape[1] - count :].clone()
    return tokens
