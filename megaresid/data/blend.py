"""Which of several data folders each sample of a run is from: exact shares, a pure function of (seed, sample).

Samples come in blocks of B. With W_i the sum of the first i+1 shares, folders 0 to i have floor(b*B*W_i) samples in
the blocks before block b, so that at the end of any block each folder is within one sample of its exact share.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np

from megaresid.data.sampler import Order, Sampler, permute
from megaresid.errors import UserError

# Samples in which shuffled folders have their shares exactly; numpy's cost per block is spread over them.
BLOCK = 1024
# A block must hold one sample of each folder, and be counted in 64 bits.
LEAST_SHARE = Fraction(1, 2**30)
# In the key of a block, where the number of a folder stands in the key of its windows.
SLOTS = -1


def shares(weights: Sequence[float | int]) -> tuple[Fraction, ...]:
    """The weights, each taken as the decimal number that it prints as, divided by their sum: 0.7 is 7/10.

    Raises UserError for a weight that is not a positive number, and for a share below LEAST_SHARE.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"--data-weights {weight}: must be above 0: leave the folder out if none of it is wanted")
    exact = [Fraction(repr(weight)) for weight in weights]
    found = tuple(weight / sum(exact) for weight in exact)
    if min(found) < LEAST_SHARE:
        raise UserError(
            f"--data-weights {' '.join(map(str, weights))}: the least is {float(min(found)):.3g} of all, and must be "
            f"at least {float(LEAST_SHARE):.3g}: leave that folder out"
        )
    return found


class Blend:
    """The folder of each sample, and its place among the samples of that folder.

    In shuffled order a keyed permutation mixes the places of a block; in sequential order the folders take turns, in
    blocks as short as the smallest share allows, and each is read from front to back.
    """

    def __init__(self, shares: Sequence[Fraction], seed: int, order: Order):
        self.seed, self.order = seed, order
        self.ends = list(accumulate(shares))
        # With fewer than one sample a block, a folder's count could go back from one block to the next.
        least = math.ceil(1 / min(shares))
        self.block = max(BLOCK, least) if order == "shuffled" else least

    def assign(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(folder, sample of that folder), int64[n] each, of int64[n] samples of the run."""
        blocks, places = np.divmod(samples, self.block)
        blocks, row = np.unique(blocks, return_inverse=True)
        slots = places if self.order == "sequential" else self._mixed(blocks, row, places)
        before, after = self._until(blocks), self._until(blocks + 1)
        ends = np.cumsum(after - before, axis=1)
        folder = (slots[:, None] >= ends[row]).sum(axis=1)
        return folder, after[row, folder] - ends[row, folder] + slots

    def _mixed(self, blocks: np.ndarray, row: np.ndarray, places: np.ndarray) -> np.ndarray:
        slots = np.empty_like(places)
        for number, block in enumerate(blocks.tolist()):
            here = row == number
            slots[here] = permute(places[here], self.block, (self.seed, SLOTS, block))
        return slots

    def _until(self, blocks: np.ndarray) -> np.ndarray:
        """int64[len(blocks), folders]: the samples of each folder in all blocks before."""
        ends = [[block * self.block * w.numerator // w.denominator for w in self.ends] for block in blocks.tolist()]
        return np.diff(np.array(ends, dtype=np.int64), axis=1, prepend=0)


class BlendedSampler:
    """Maps global samples to windows of several folders, numbered one folder after another."""

    def __init__(self, windows: Sequence[int], shares: Sequence[Fraction], seed: int, order: Order):
        self.blend = Blend(shares, seed, order)
        self.samplers = [Sampler(count, seed, order, folder) for folder, count in enumerate(windows)]
        self.starts = [0, *accumulate(windows)]

    def window_of(self, samples: np.ndarray) -> np.ndarray:
        """int64[...] windows of int64[...] global samples."""
        folders, own = self.blend.assign(samples.reshape(-1))
        result = np.empty_like(own)
        for folder in np.unique(folders).tolist():
            here = folders == folder
            result[here] = self.starts[folder] + self.samplers[folder].window_of(own[here])
        return result.reshape(samples.shape)
