"""Whether what was written is the model that it was made of: logits on fixed ids, before and after."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megaresid.errors import UserError
from megaresid.model.presets import ModelShape

TOLERANCE = 1e-4
"""Largest difference of two fp32 logits of equal weights under two implementations."""
FP64_TOLERANCE = 1e-8
BLOCK = 2**20  # elements that are compared at a time: logits of a long text are large


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
    """Logits [1, T, V] on the CPU of every probe, in the model's dtype."""
    return [model(ids).cpu() for ids in probes(shape)]


def largest_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """0 where all logits are equal, not-a-number too; infinite where one is not finite on one side alone."""
    largest = 0.0
    for one, other in zip(before, after, strict=True):
        if one.shape != other.shape:
            return math.inf
        for a, b in zip(one.flatten().split(BLOCK), other.flatten().split(BLOCK)):
            apart = (a != b) & ~(a.isnan() & b.isnan())
            difference = (a[apart] - b[apart]).abs().nan_to_num(nan=math.inf, posinf=math.inf)
            largest = max(largest, difference.max().item() if len(difference) else 0.0)
    return largest


def require_equal(before: list[Tensor], after: list[Tensor], what: str) -> str:
    """Hold logits of one implementation to be equal, and tell it; raises UserError with the largest difference."""
    if largest := largest_difference(before, after):
        _fail(what, largest, "none")
    return "logits equal bit for bit"


def require_equal_parameters(
    before: Iterable[tuple[str, Tensor]], after: Iterable[tuple[str, Tensor]], what: str
) -> str:
    """The lesser check, of a model that cannot be run here: every parameter, in one order, has the same values."""
    for (name, tensor), (_, other) in zip(before, after, strict=True):
        if largest := largest_difference([tensor], [other]):
            raise UserError(f"{what} failed the check: its {name} differs by up to {largest:.3g}: nothing was kept")
    return "parameters equal bit for bit; a mixer needs a GPU, and there is none to compare logits on"


def require_close(
    before: list[Tensor], after: list[Tensor], in_fp64: Callable[[], tuple[list[Tensor], list[Tensor]]], what: str
) -> str:
    """Hold fp32 logits of two implementations to ``TOLERANCE``, and tell how close they are.

    A deep model of large weights may magnify its rounding beyond that. Then both are computed again, by ``in_fp64``,
    where what is left of a mistake stays and rounding does not. Raises UserError with the largest difference.
    """
    largest = largest_difference(before, after)
    if largest <= TOLERANCE:
        return f"logits equal to {largest:.2g}, {TOLERANCE:g} allowed"
    if not all(logits.isfinite().all() for logits in (*before, *after)):
        _fail(what, largest, f"{TOLERANCE:g}")
    if (exact := largest_difference(*in_fp64())) > FP64_TOLERANCE:
        _fail(what, exact, f"{FP64_TOLERANCE:g} in fp64")
    return f"logits equal to {largest:.2g}, which is rounding: to {exact:.2g} in fp64, {FP64_TOLERANCE:g} allowed"


def _fail(what: str, largest: float, allowed: str) -> None:
    raise UserError(
        f"{what} failed the check: its logits differ by up to {largest:.3g} from those of what it was made of, and "
        f"{allowed} is allowed: nothing was kept"
    )
