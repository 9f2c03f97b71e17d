"""Log-probabilities of continuations, the one thing that every perplexity and every multiple-choice task is made of."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megaresid.evaluation.hook import Measurable
from megaresid.evaluation.progress import followed

# Of one forward on a CPU: what more of them make leaves the cache.
CPU_POSITIONS = 1024
# Fewer leave a GPU waiting for the CPU, which tells it what to do.
ENOUGH_POSITIONS = 2048
LEAST_FILLED = 0.9
# Of one row: every position of a batch has as many places for targets as the one where the most is asked.
MOST_ASKED = 64


class Request(NamedTuple):
    """Token ids of a text and of what follows it; both hold at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """The log-probability of the whole continuation, and whether each of its tokens was the likeliest."""

    log_probability: float
    greedy: bool


class Row(NamedTuple):
    """One sequence to run: input ids [L] and, of each request that it answers, (number, first position, targets)."""

    inputs: np.ndarray
    asked: list[tuple[int, int, np.ndarray]]


def score(engine: Measurable, requests: Sequence[Request], progress: bool = True) -> list[Score]:
    """log p(continuation | context) of each request, in their order.

    As in lm-evaluation-harness the last ``engine.context + 1`` tokens of context and continuation count; their last is
    predicted and not read. A continuation longer than ``engine.context`` counts with its last tokens alone.

    Every rank calls it with the same requests and gets the same scores. The ranks share the work and run the model
    equally often. Equal requests are run once, and one whose input begins another's is answered by that one's run.
    Except for rounding, a score depends on nothing but its request. Sums over a continuation are in fp64.

    Raises ValueError, naming the request, for an empty context or continuation and for what is no id of the vocabulary.
    """
    if not requests:
        return []
    sequences, counts = zip(*(_sequence(engine, number, *request) for number, request in enumerate(requests)))
    rows, answered_by = _rows(sequences, counts)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    most = CPU_POSITIONS if engine.device.type == "cpu" else engine.positions_per_forward
    batches = _batches(rows, min(most, engine.positions_per_forward), ranks)
    rounds = -(-len(batches) // ranks)
    turns = range(rank, rounds * ranks, ranks)
    owners, found = [], []
    for turn in followed(turns, rounds, "scoring") if progress and rank == 0 else turns:
        idx, targets, owner = _tensors(batches[turn] if turn < len(batches) else [])
        owners.append(owner)
        found.append(engine.score(idx, targets))
    totals = _totals(np.concatenate(owners), found, len(requests))
    if ranks > 1:
        totals = totals.to(engine.device)
        dist.all_reduce(totals)
    log_probabilities, misses = totals.cpu()[:, answered_by].tolist()
    return [Score(log_p, missed == 0) for log_p, missed in zip(log_probabilities, misses, strict=True)]


def _sequence(engine: Measurable, number: int, context: Sequence[int], continuation: Sequence[int]):
    """A request's tokens that count, int32, and how many of them are predicted: those at the end."""
    if len(context) == 0 or len(continuation) == 0:
        raise ValueError(f"request {number}: its {'continuation' if len(context) else 'context'} is empty")
    predicted = min(len(continuation), engine.context)
    read = max(1, engine.context + 1 - len(continuation))  # of a long context only the end
    ids = np.concatenate([context[-read:], continuation])[-(engine.context + 1) :]
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= engine.vocab_size:
        wrong = next((i for i in ids.tolist() if type(i) is not int or not 0 <= i < engine.vocab_size), None)
        raise ValueError(f"request {number}: {wrong!r} is no id of a vocabulary of {engine.vocab_size}")
    return ids.astype(np.int32), predicted


def _rows(sequences: Sequence[np.ndarray], counts: Sequence[int]) -> tuple[list[Row], list[int]]:
    """The rows to run, the longest first, and of each request the equal one that is run for it.

    Attention is causal: a run of an input answers whatever begins with the same tokens and ends earlier. In descending
    order an input comes after all that begin with it, and the last one kept is one of them if there are any.
    """
    inputs = [ids[:-1].tobytes() for ids in sequences]
    keys = [(begin, int(ids[-1]), count) for begin, ids, count in zip(inputs, sequences, counts, strict=True)]
    first = {}
    answered_by = [first.setdefault(key, number) for number, key in enumerate(keys)]
    rows, last = [], b""
    for key in sorted(first, reverse=True):
        number = first[key]
        ids, count = sequences[number], counts[number]
        if not last.startswith(key[0]) or len(rows[-1].asked) == MOST_ASKED:
            last = key[0]
            rows.append(Row(ids[:-1], []))
        rows[-1].asked.append((number, len(ids) - 1 - count, ids[-count:]))
    rows.sort(key=lambda row: -len(row.inputs))
    return rows, answered_by


def _batches(rows: list[Row], positions: int, ranks: int) -> list[list[Row]]:
    """Cut rows that are ordered by length into batches of at most ``positions``, padding included, or of one row.

    A batch that is large enough ends where more would be mostly padding. Where there is little to do, each rank gets a
    share of it.
    """
    positions = min(positions, -(-len(rows) // ranks) * len(rows[0].inputs))
    batches, start = [], 0
    for end in range(1, len(rows) + 1):
        held = (end - start) * len(rows[start].inputs)
        if (
            end == len(rows)
            or held + len(rows[start].inputs) > positions
            or (held >= ENOUGH_POSITIONS and len(rows[end].inputs) < LEAST_FILLED * len(rows[start].inputs))
        ):
            batches.append(rows[start:end])
            start = end
    return batches


def _tensors(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """idx [m, T], targets [m, T] or [m, T, K], and the request of each wanted target in row-major order.

    Without rows one position is run, for nothing: each rank runs the model equally often.
    """
    length = max((len(row.inputs) for row in rows), default=1)
    idx = np.zeros((max(len(rows), 1), length), dtype=np.int64)
    # The targets of one position stand side by side: the k-th request that asks there has the k-th place.
    asked = [(i, *request) for i, row in enumerate(rows) for request in row.asked]
    used = np.zeros(idx.shape, dtype=np.int64)
    for i, _, start, ids in asked:
        used[i, start : start + len(ids)] += 1
    places = max(int(used.max()), 1)
    targets = np.full((*idx.shape, places), -1, dtype=np.int64)
    owner = np.full(targets.shape, -1, dtype=np.int64)
    used[:] = 0
    for i, row in enumerate(rows):
        idx[i, : len(row.inputs)] = row.inputs
    for i, number, start, ids in asked:
        at = np.arange(start, start + len(ids))
        targets[i, at, used[i, at]] = ids
        owner[i, at, used[i, at]] = number
        used[i, at] += 1
    if places == 1:
        targets = targets[..., 0]
    return torch.from_numpy(idx), torch.from_numpy(targets), owner[owner >= 0]


def _totals(owner: np.ndarray, found: list[tuple[torch.Tensor, torch.Tensor]], requests: int) -> torch.Tensor:
    """fp64 [2, requests]: the summed log-probability of each, and how many of its tokens are not the likeliest."""
    # Only here does the CPU wait for the device.
    log_p, greedy = (torch.cat(tensors).cpu().numpy() for tensors in zip(*found, strict=True))
    sums = [np.bincount(owner, weights, minlength=requests) for weights in (log_p, ~greedy)]
    return torch.from_numpy(np.stack(sums).astype(np.float64))  # the count of nothing is an integer
