"""Which tokens a run sees at which step: a pure function of (seed, global sample index).

There is no generator and no stored order. Sample s of the run is window ``permute(s mod n)`` of the data, under
another permutation in each epoch, or window s mod n itself in sequential order, so any number of ranks, workers and
restarts sees the same order.
"""

import hashlib
from fractions import Fraction
from typing import Literal

import numpy as np

from megaresid.errors import UserError

ROUNDS = 8
U64 = np.uint64
Order = Literal["shuffled", "sequential"]


def windows(tokens: int, context: int) -> int:
    """How many windows of ``context`` inputs, each with its next tokens as targets, lie side by side in a stream."""
    return max(tokens - 1, 0) // context


def check_capacity(tokens: int, *, context: int, global_batch: int, where: str, share: Fraction = Fraction(1)) -> int:
    """The windows of a stream of ``tokens``; UserError when they do not fill its share of one global batch.

    ``where`` names the stream.
    """
    available = windows(tokens, context)
    if available < share * global_batch:
        part = "" if share == 1 else f"its share ({float(share):.3g}) of "
        raise UserError(
            f"{where}: {tokens} tokens give {available} sequences of {context}, fewer than {part}one global batch of "
            f"{global_batch}; use more text, a smaller global batch or a shorter context"
        )
    return available


def permute(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """A keyed bijection of [0, size), applied to int64[...] ``index``; no table in memory.

    A balanced Feistel network over the next even power of two, which is a bijection whatever its round function is;
    what falls outside [0, size) goes through it again until it falls inside (cycle walking; Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002). Raises IndexError for an index outside [0, size).
    """
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise IndexError(f"an index outside [0, {size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    result = _feistel(index.astype(U64), half, keys)
    while (outside := result >= U64(size)).any():
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def sample_indices(
    step: int, accumulation_index: int, rank: int, *, global_batch: int, ranks: int, micro_batch: int
) -> np.ndarray:
    """int64[micro_batch] global sample indices of one micro-batch: s = step*G + a*(R*m) + rank*m + j."""
    first = step * global_batch + accumulation_index * ranks * micro_batch + rank * micro_batch
    return np.arange(first, first + micro_batch, dtype=np.int64)


class Sampler:
    """Maps global samples to windows; epoch e is samples [e*windows, (e+1)*windows), each window once.

    In sequential order the seed plays no part. ``folder`` is its number where several are blended, each of which has
    permutations of its own.
    """

    def __init__(self, windows: int, seed: int, order: Order = "shuffled", folder: int | None = None):
        self.windows, self.order = windows, order
        self.key = (seed,) if folder is None else (seed, folder)

    def window_of(self, samples: np.ndarray) -> np.ndarray:
        """int64[...] windows of int64[...] global samples."""
        epochs, within = np.divmod(samples, self.windows)
        if self.order == "sequential":
            return within
        result = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            result[here] = permute(within[here], self.windows, (*self.key, epoch))
        return result


def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    """uint64[ROUNDS]: any integers, well mixed, the same on every machine."""
    text = ",".join(str(part) for part in key)
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")


def _feistel(value: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """Permute uint64[n] values of 2*half bits."""
    bits, mask = U64(half), U64((1 << half) - 1)
    left, right = value >> bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << bits) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014), uint64[n] to uint64[n]."""
    value = (value ^ (value >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> U64(27))) * U64(0x94D049BB133111EB)
    return value ^ (value >> U64(31))
