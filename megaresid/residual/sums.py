"""Weighted sums of many tensors of the stream: a history over depth, or streams side by side."""

from collections.abc import Sequence

import torch


def weighted_sum(weights: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """sum_j weights[j] tensors[j] of tensors [..., C] and weights that broadcast to them ([] or [..., 1]).

    A loop over references, added from the left: they are never copied into one tensor, autograd keeps nothing but what
    it is given, and a compiler makes it one kernel.
    """
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = torch.addcmul(total, weight, tensor)
    return total


def weighted_sum_flops(count: int, width: int) -> int:
    """FLOPs per token of a sum of ``count`` tensors."""
    return (2 * count - 1) * width
