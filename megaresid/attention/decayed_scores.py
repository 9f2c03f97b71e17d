"""The scores inside a chunk under a decay, by recursive halving.

A factor exp(G_i) exp(-G_j) of cumulated decays overflows, and a tensor of all pairs and channels is slow. Two halves
of a block meet in the middle instead: exp(sum over (middle, i]) exp(sum over (j, middle]), two factors of at most 1,
is a matrix product for all pairs across the middle; each half is then cut again. (Secondary chunking, Yang et al.
2023, arXiv 2312.06635, section 4.3, taken to its end.) Sums only ever grow, so nothing cancels, and no sum reaches
beyond the pair that it belongs to: what other documents hold leaves no trace.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Decayed(NamedTuple):
    """``scores`` [..., C, C] of each of the queries, lower triangular; ``since`` and ``until`` [..., C, K]: the sum of
    g from the chunk's first token to this one, and from after this one to the chunk's last."""

    scores: list[Tensor]
    since: Tensor
    until: Tensor


def decayed_scores(queries: tuple[Tensor, ...], k: Tensor, g: Tensor) -> Decayed:
    """scores_ij = sum_d q_id k_jd exp(g_{j+1,d} + ... + g_{i,d}) for j <= i; q, k, g <= 0 [..., C, K], C a power of 2.

    The queries share the exponentials.
    """
    length = k.shape[-2]
    scores = [(q * k).sum(-1)[..., None, None] for q in queries]  # [..., blocks, half, half], from single tokens on
    since, until = g.unsqueeze(-2), torch.zeros_like(g).unsqueeze(-2)  # [..., blocks, half, K]
    half = 1
    while half < length:
        blocks = (length // (2 * half), 2, half)
        (since_1, since_2), (until_1, until_2) = (x.unflatten(-3, (-1, 2)).unbind(-3) for x in (since, until))
        keys = k.unflatten(-2, blocks)[..., 0, :, :] * until_1.exp()
        arriving = since_2.exp()
        scores = [
            _lower(x, (q.unflatten(-2, blocks)[..., 1, :, :] * arriving) @ keys.mT)
            for x, q in zip(scores, queries, strict=True)
        ]
        since = torch.cat([since_1, since_2 + since_1[..., -1:, :]], -2)
        until = torch.cat([until_1 + since_2[..., -1:, :], until_2], -2)
        half *= 2
    return Decayed([x.squeeze(-3) for x in scores], since.squeeze(-3), until.squeeze(-3))


def _lower(diagonal: Tensor, corner: Tensor) -> Tensor:
    """[[a, 0], [corner, b]] of the pairs (a, b) of neighbours in ``diagonal`` [..., 2 m, h, h]: [..., m, 2 h, 2 h]."""
    a, b = diagonal.unflatten(-3, (-1, 2)).unbind(-3)
    return torch.cat([torch.cat([a, torch.zeros_like(a)], -1), torch.cat([corner, b], -1)], -2)
