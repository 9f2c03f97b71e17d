"""The scores inside a chunk under a decay, by recursive halving.

A factor exp(G_i) exp(-G_j) of cumulated decays overflows, and a tensor of all pairs and channels is slow. Two halves
of a block meet in the middle instead: exp(sum over (middle, i]) exp(sum over (j, middle]), two factors of at most 1,
is a matrix product for all pairs across the middle; each half is then cut again. (Secondary chunking, Yang et al.
2023, arXiv 2312.06635, section 4.3, taken to its end.) Sums only ever grow, so nothing cancels, and no sum reaches
beyond the pair that it belongs to: what other documents hold leaves no trace.

Forward and backward are ``torch.library`` operators. They work in place, in pieces that stay in a CPU's cache, and make
the exponentials again rather than keep them; to ``torch.compile`` each is one node.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CPU_PIECE = 1 << 17  # elements of k; of more, a level finds little of the one before in the cache


class Decayed(NamedTuple):
    """``scores`` [..., C, C] of each of the queries, lower triangular; ``since`` and ``until`` [..., C, K]: the sum of
    g from the chunk's first token to this one, and from after this one to the chunk's last."""

    scores: list[Tensor]
    since: Tensor
    until: Tensor


def decayed_scores(queries: tuple[Tensor, ...], k: Tensor, g: Tensor) -> Decayed:
    """scores_ij = sum_d q_id k_jd exp(g_{j+1,d} + ... + g_{i,d}) for j <= i; q, k, g <= 0 [..., C, K], C a power of 2.

    The queries share the exponentials. There is no second derivative.
    """
    since, until, *scores = _scores([x.flatten(0, -3) for x in queries], k.flatten(0, -3), g.flatten(0, -3))
    return Decayed(*([x.unflatten(0, k.shape[:-2]) for x in scores], *(x.view_as(k) for x in (since, until))))


@torch.library.custom_op("megaresid::decayed_scores", mutates_args=())
def _scores(queries: list[Tensor], k: Tensor, g: Tensor) -> list[Tensor]:
    """since, until and the scores, of chunks [N, C, K]."""
    results = _empty(queries, k, g)
    for q, k_, g_, (since, until, *scores) in _pieces(queries, k, g, results):
        since.copy_(g_)
        until.zero_()
        for x, found in zip(q, scores, strict=True):
            found.zero_()
            found.diagonal(dim1=-2, dim2=-1).copy_((x * k_).sum(-1))
        for half, leaving, arriving in _levels(since, until):
            keys = (_first(k_, half) * leaving).mT
            for x, found in zip(q, scores, strict=True):
                _corners(found, half).copy_((_second(x, half) * arriving) @ keys)
    return results


@torch.library.custom_op("megaresid::decayed_scores_backward", mutates_args=())
def _gradients(queries: list[Tensor], k: Tensor, g: Tensor, d_results: list[Tensor]) -> list[Tensor]:
    """Of k, g and the queries."""
    results = [torch.empty_like(x) for x in (k, g, *queries)]
    for q, k_, g_, (d_since, d_until, *d_scores), (d_k, d_g, *d_q) in _pieces(queries, k, g, d_results, results):
        levels = list(_levels(g_.clone(), torch.zeros_like(g_)))
        d_g.copy_(d_since)  # sums are taken apart again from the whole chunk down to single tokens, whose since is g
        d_until = d_until.clone()
        d_k.zero_()
        for x, d_x, d in zip(q, d_q, d_scores, strict=True):
            diagonal = d.diagonal(dim1=-2, dim2=-1)[..., None]
            torch.mul(diagonal, k_, out=d_x)
            d_k.addcmul_(diagonal, x)
        for half, leaving, arriving in reversed(levels):
            first, second = _first(d_g, half), _second(d_g, half)
            first[..., -1, :] += second.sum(-2)
            second[..., -1, :] += _first(d_until, half).sum(-2)
            keys, d_keys = _first(k_, half) * leaving, 0
            for x, d_x, d in zip(q, d_q, d_scores, strict=True):
                corners, rows = _corners(d, half).contiguous(), _second(x, half)
                d_rows = (corners @ keys).mul_(arriving)
                d_keys = d_keys + corners.mT @ (rows * arriving)
                _second(d_x, half).add_(d_rows)
                second.addcmul_(d_rows, rows)
            d_keys *= leaving
            _first(d_k, half).add_(d_keys)
            _first(d_until, half).addcmul_(d_keys, _first(k_, half))
    return results


@_scores.register_fake
def _empty(queries, k, g):
    return [torch.empty_like(g), torch.empty_like(g), *(k.new_empty(*k.shape[:-1], k.shape[-2]) for _ in queries)]


@_gradients.register_fake
def _(queries, k, g, d_results):
    return [torch.empty_like(x) for x in (k, g, *queries)]


def _keep(ctx, inputs, output):
    queries, k, g = inputs
    ctx.save_for_backward(k, g, *queries)


def _backward(ctx, d_results):
    k, g, *queries = ctx.saved_tensors
    d_k, d_g, *d_queries = _gradients(queries, k, g, d_results)
    return d_queries, d_k, d_g


_scores.register_autograd(_backward, setup_context=_keep)


def _pieces(*arguments: Tensor | list[Tensor]) -> Iterator[tuple]:
    """The arguments, cut along their first axis into pieces that fit a CPU's cache; on a GPU whole."""
    k = arguments[1]
    count = max(1, CPU_PIECE // k[0].numel()) if k.device.type == "cpu" else len(k)
    for start in range(0, len(k), count):
        rows = slice(start, start + count)
        yield tuple([x[rows] for x in a] if isinstance(a, (list, tuple)) else a[rows] for a in arguments)


def _levels(since: Tensor, until: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(half, exp(sum over (j, middle]) of first halves, exp(sum over (middle, i]) of second ones), each [N, m, half,
    K], for blocks of 2, 4, ..., C tokens. ``since`` and ``until`` begin as those of single tokens, and end as the
    chunk's."""
    half = 1
    while half < since.shape[-2]:
        first, second = _first(since, half), _second(since, half)
        yield half, _first(until, half).exp(), second.exp()
        _first(until, half).add_(second[..., -1:, :])
        second.add_(first[..., -1:, :])
        half *= 2


def _first(x: Tensor, half: int) -> Tensor:
    """The first halves of blocks: a view [N, m, half, K] of x [N, 2 m half, K]."""
    return x.unflatten(-2, (-1, 2, half)).select(-3, 0)


def _second(x: Tensor, half: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, half)).select(-3, 1)


def _corners(scores: Tensor, half: int) -> Tensor:
    """Of second halves with first ones: a view [N, m, half, half] of scores [N, C, C]."""
    blocks = scores.unflatten(-1, (-1, 2 * half)).unflatten(-3, (-1, 2 * half))  # [N, m, 2 half, m, 2 half]
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., half:, :half]
