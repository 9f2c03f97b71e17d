"""The calls of flash-linear-attention's kernels, with ``recurrence``'s arguments and results.

It is imported where a kernel is wanted and not before: what it needs of torch's compiler takes a second to load.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from megaresid.attention.kernels.routes import DECAYS, KERNELS, Kernel, facts_of, route
from megaresid.attention.kind import Kind

ALIGNMENT = 16
"""Kernels multiply tiles of at least 16; odd widths are refused in 16-bit types."""


@torch.compiler.disable
def apart(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """``function(...)`` outside of a compiled graph: one break."""
    return function(*arguments, **keywords)


def form_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor | None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """A function with ``recurrence``'s arguments that runs these in a kernel, or None for the plain form."""
    number = _kernel_number(tuple(kind_of(q, v, g, beta)), product_dtype(q, k, v), q.device)
    return None if number is None else functools.partial(apart, run, KERNELS[number])


@torch.compiler.assume_constant_result
def _kernel_number(kind: tuple[str, bool, int, int], dtype: torch.dtype, device: torch.device) -> int | None:
    """The place in ``KERNELS`` of the kernel that runs on ``device``, None for the plain form; a compiler takes it as a
    constant."""
    kernel = route(Kind(*kind), dtype, facts_of(device)).kernel
    return None if kernel is None else KERNELS.index(kernel)


def product_dtype(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.dtype:
    """What a kernel multiplies in: autocast's type, as in any product under it, else the widest of the inputs'."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    kind = q.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and dtype != torch.float64 else dtype


def kind_of(q: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor | None) -> Kind:
    """The recurrence of ``recurrence``'s arguments. A constant decay that is trained counts as a token's own, because
    the kernel for constant ones gives it no gradient."""
    decay = DECAYS[0 if g is None else g.dim() - (g.dim() > 1)]
    if decay == "constant" and g.requires_grad:
        decay = "head"
    return Kind(decay, beta is not None, q.shape[-1], v.shape[-1])


def run(
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    state: torch.Tensor | None = None,
    segment: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``recurrence`` by ``kernel``, whose products are in ``product_dtype``; sums, decays and the state are in fp32."""
    batch, _, _, keys = q.shape
    values, result_dtype, dtype = v.shape[-1], v.dtype, product_dtype(q, k, v)
    scale = keys**-0.5 if scale is None else scale
    if kernel.decay != "none":
        g = _widened(g, kernel.decay, k)
    if kernel.decay == "channel":
        g = _aligned(g)
    q, k, v = (_aligned(x.to(dtype)) for x in (q, k, v))  # zeros in keys and values change nothing
    if state is not None:
        state = pad(state.float(), (0, -values % ALIGNMENT, 0, -keys % ALIGNMENT))
    arguments = {} if kernel.decay == "none" else {kernel.gate: g}
    if kernel.delta:
        arguments["beta"] = beta.float()
    documents = None if segment is None else documents_of(segment)
    if documents is not None:
        # fla wants all documents in one row, and a state for each.
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
        arguments = {name: x if x.dim() == 1 else x.flatten(0, 1)[None] for name, x in arguments.items()}
        if state is not None:
            count = len(documents.offsets) - 1
            state = state.new_zeros(count, *state.shape[1:]).index_copy(0, documents.first, state)
        arguments["cu_seqlens"] = documents.offsets
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    with torch.autocast(q.device.type, enabled=False):
        o, state = function(
            q=q, k=k, v=v, scale=scale, initial_state=state, output_final_state=True, **arguments, **kernel.options
        )
    if documents is not None:
        o, state = o.unflatten(1, (batch, -1))[0], state[documents.last]
    return o[..., :values].to(result_dtype), state[..., :keys, :values]


def _widened(g: torch.Tensor, decay: str, k: torch.Tensor) -> torch.Tensor:
    """The decay as a kernel takes it, in fp32: [H], [B, T, H] or [B, T, H, K]."""
    if decay == "constant":
        return g.float()
    g = g.float().expand(k.shape[:3]) if g.dim() == 1 else g.float()
    return g[..., None].expand(k.shape) if decay == "channel" and g.dim() == 3 else g


def _aligned(x: torch.Tensor) -> torch.Tensor:
    return pad(x, (0, -x.shape[-1] % ALIGNMENT))


class Documents(NamedTuple):
    """Where documents begin in the rows of a batch laid end to end, int64 [N + 1] with the end of all; and the numbers
    of each row's first and last document, int64 [B]."""

    offsets: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor


# Every layer asks for the same batch, and the answer waits for the GPU. Kept with the version of what was asked: a
# tensor may be filled anew in its place.
_documents: WeakIdKeyDictionary = WeakIdKeyDictionary()


def documents_of(segment: torch.Tensor) -> Documents:
    """The documents of ``segment`` int32 [B, T]; a row's first token begins one."""
    version = 0 if segment.is_inference() else segment._version  # which tensors of inference mode have not
    seen, found = _documents.get(segment, (None, None))
    if seen != version:
        begins = torch.ones_like(segment, dtype=torch.bool)
        begins[:, 1:] = segment[:, 1:] != segment[:, :-1]
        starts = begins.flatten().nonzero().squeeze(1)
        numbers = begins.flatten().cumsum(0).view_as(segment) - 1
        offsets = torch.cat([starts, starts.new_full((1,), segment.numel())])
        found = Documents(offsets, numbers[:, 0].contiguous(), numbers[:, -1].contiguous())
        _documents[segment] = version, found
    return found
