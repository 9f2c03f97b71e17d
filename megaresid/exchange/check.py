"""Whether what was written is the model that it was made of: logits on fixed ids, before and after."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megaresid.errors import UserError
from megaresid.model.presets import ModelShape

TOLERANCE = 1e-4
"""Largest difference of two fp32 logits of equal weights under two implementations."""


def probes(shape: ModelShape) -> list[Tensor]:
    """Fixed ids, int64 [1, T] each, of lengths up to the context; in the longest there is a document's end."""
    generator = torch.Generator().manual_seed(20240520)
    lengths = sorted({min(length, shape.context) for length in (1, 2, 33, shape.context)})
    ids = [torch.randint(shape.vocab_size, (1, length), generator=generator) for length in lengths]
    if shape.context > 2 and shape.end_of_text < shape.vocab_size:
        ids[-1][0, shape.context // 2] = shape.end_of_text
    return ids


@torch.inference_mode()
def logits_on(model: Callable[[Tensor], Tensor], shape: ModelShape) -> list[Tensor]:
    """fp32 logits [1, T, V] on the CPU of every probe."""
    return [model(ids).float().cpu() for ids in probes(shape)]


def largest_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """0 where every logit has the same bits, not-a-number too; infinite where one is not finite on one side alone."""
    largest = 0.0
    for one, other in zip(before, after, strict=True):
        if one.shape != other.shape:
            return math.inf
        apart = one.view(torch.int32) != other.view(torch.int32)
        difference = (one[apart] - other[apart]).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        largest = max(largest, difference.max().item() if len(difference) else 0.0)
    return largest


def require_equal(before: list[Tensor], after: list[Tensor], tolerance: float, what: str) -> float:
    """The largest difference; raises UserError that names it where it is above ``tolerance``."""
    if (largest := largest_difference(before, after)) > tolerance:
        raise UserError(
            f"{what} failed the check: its logits differ by up to {largest:.3g} from those of what it was made of, and "
            f"{tolerance:g} is allowed: nothing was kept"
        )
    return largest
