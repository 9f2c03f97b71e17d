"""The recurrence in chunks: matrix products inside a chunk, one state between two.

With S the state that enters a chunk, and G_i the sum of g from the chunk's first token to its token i::

    without beta:  o_i = q_i e^{G_i} S + sum_{j<=i} A_ij v_j      A_ij = q_i e^{G_i - G_j} k_j
    with beta:     r_j for v_j, where (I + L) r = beta (v - k e^G S), L_ij = beta_i k_i e^{G_i - G_j} k_j for j < i

(Yang et al. 2024, arXiv 2406.06484, section 3.2; with a decay Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464, section
3.3.) Documents are masks on A and L, on what the entering state reaches and on what reaches the leaving one.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from megaresid.attention.decayed_scores import decayed_scores

CHUNK = 64


def by_chunks(q, k, v, g=None, beta=None, *, scale=None, state=None, segment=None):
    """Arguments and results are those of ``recurrence``."""
    wide = torch.promote_types(q.dtype, torch.float32)
    length, dtype = q.shape[1], v.dtype
    size = min(CHUNK, 1 << (length - 1).bit_length())

    def split(x: Tensor) -> Tensor:
        """[B, T, H, D] -> [B, H, N, C, D]; zeros at the end change neither outputs nor state."""
        x = pad(x.to(wide), (0, 0, 0, 0, 0, -length % size))
        return x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4).contiguous()

    with torch.autocast(q.device.type, enabled=False):
        if state is None:
            state = q.new_zeros(*q.shape[::2], k.shape[-1], v.shape[-1], dtype=wide)
        if g is not None and g.dim() < 4:
            g = (g.expand(1, length, -1) if g.dim() == 1 else g)[..., None]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = split(q.to(wide) * scale), split(k), split(v)
        g, beta = (None if x is None else split(x) for x in (g, None if beta is None else beta[..., None]))
        documents = None if segment is None else Documents.of(segment, size)
        if beta is None:
            (scores,), reach = _inside((q,), k, g, documents)
            states, state = _carry(_times(k, reach.leaving).mT @ v, reach.kept, state.to(wide))
            o = scores @ v + _times(q, reach.entering) @ states
        else:
            o, state = _delta_rule(q, k, k * beta, v * beta, g, documents, state.to(wide))
        return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length].to(dtype), state


class Documents(NamedTuple):
    """Which tokens of a chunk see what, bool: ``same`` [B, 1, N, C, C] each other; ``entered`` [B, 1, N, C, 1] the
    entering state; ``last`` [B, 1, N, C, 1] are seen by the leaving state; ``unbroken`` [B, 1, N, 1, 1], whether the
    leaving state sees the entering one."""

    same: Tensor
    entered: Tensor
    last: Tensor
    unbroken: Tensor

    @classmethod
    def of(cls, segment: Tensor, size: int) -> "Documents":
        """Of the documents [B, T] of tokens, in chunks of ``size``; padding belongs to the last one."""
        number = pad((segment[:, 1:] != segment[:, :-1]).cumsum(1), (1, 0))  # also where numbers come again later
        number = torch.cat([number, number[:, -1:].expand(-1, -number.shape[1] % size)], 1)
        number = number.unflatten(1, (-1, size))[:, None]  # [B, 1, N, C]
        end = number[..., -1:]
        before = torch.cat([number[:, :, :1, :1], end[:, :, :-1]], 2)
        same = number[..., :, None] == number[..., None, :]
        return cls(same, (number == before)[..., None], (number == end)[..., None], (end == before)[..., None])


class Reach(NamedTuple):
    """Factors; None is 1. ``entering`` [B, H, N, C, K] of the entering state on its way to a token, ``leaving`` of a
    token on its way to the leaving state, ``kept`` [B, H, N, K, 1] of the state from chunk to chunk. B, H, C and K may
    be 1."""

    entering: Tensor | None
    leaving: Tensor | None
    kept: Tensor | None


def _inside(queries: tuple[Tensor, ...], k: Tensor, g: Tensor | None, documents: Documents | None):
    """The scores [B, H, N, C, C] of queries with keys, 0 above the diagonal, and the chunk's reach."""
    if g is None:
        scores, reach = [(x @ k.mT).tril() for x in queries], Reach(None, None, None)
    else:
        if g.shape[-1] > 1:
            scores, since, until = decayed_scores(queries, k, g)
        else:
            (decay,), since, until = decayed_scores((torch.ones_like(g),), torch.ones_like(g), g)
            scores = [x @ k.mT * decay for x in queries]
        reach = Reach(since.exp(), until.exp(), since[..., -1:, :].exp().mT)
    if documents is not None:
        scores = [x.masked_fill(~documents.same, 0) for x in scores]
        masks = (documents.entered, documents.last, documents.unbroken)
        reach = Reach(*(mask.to(k.dtype) if x is None else x * mask for x, mask in zip(reach, masks, strict=True)))
    return scores, reach


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _carry(update: Tensor, kept: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state that enters each chunk [B, H, N, K, V] and the last: S <- kept S + update."""
    states = []
    factors = [None] * update.shape[2] if kept is None else kept.unbind(2)  # slices would make backward quadratic in N
    for factor, added in zip(factors, update.unbind(2), strict=True):
        states.append(state)
        state = state + added if factor is None else torch.addcmul(added, state, factor)
    return torch.stack(states, 2), state


def _delta_rule(q, k, weighted_k, weighted_v, g, documents, state) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, N, C, V] and the last state; ``weighted_`` is times beta.

    r = u - w S with (I + L) (u, w) = beta (v, k e^G). Put into outputs and state, S stands alone: all else is done for
    all chunks at once, and S <- (kept - k^T w) S + k^T u is one product a chunk.
    """
    (scores, overlap), reach = _inside((q, weighted_k), k, g, documents)
    right = torch.cat([weighted_v, _times(weighted_k, reach.entering)], -1)
    solved = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True)
    sizes = (weighted_v.shape[-1], k.shape[-1])
    values, reads = (scores @ solved).split(sizes, -1)
    update, erased = (_times(k, reach.leaving).mT @ solved).split(sizes, -1)
    transition = _times(torch.eye(k.shape[-1], dtype=k.dtype, device=k.device), reach.kept) - erased
    states = []
    for move, added in zip(transition.unbind(2), update.unbind(2), strict=True):
        states.append(state)
        state = move @ state + added
    return values + (_times(q, reach.entering) - reads) @ torch.stack(states, 2), state
