"""What each rank is given at each step, written down for ``megaresid.verify_resume``.

It is asked for by the environment, since it is no part of a run's configuration:

    MEGARESID_TRACE=FOLDER      each rank appends a line for each micro-batch to FOLDER/rank_00000.jsonl
    MEGARESID_HOLD_AFTER=N      after N steps every rank waits, until it is killed
"""

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megaresid.data.blend import BlendedSampler
from megaresid.data.sampler import Sampler

FOLDER = "MEGARESID_TRACE"
HOLD_AFTER = "MEGARESID_HOLD_AFTER"

Batch = tuple[torch.Tensor, torch.Tensor]


def trace_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.jsonl"


class Trace:
    """Of one rank, from step ``first`` on: the samples that its sampler was asked for, the windows that these were, and
    a hash of the tokens that the engine took. Passes everything through as it is; does nothing where it is not asked.
    """

    def __init__(self, rank: int, first: int, accumulation: int):
        folder = os.environ.get(FOLDER)
        self._file = trace_file(Path(folder), rank) if folder else None
        self._hold_after = int(os.environ.get(HOLD_AFTER, 0))
        self._first, self._accumulation = first, accumulation
        self._drawn: deque[tuple[list[int], list[int]]] = deque()  # ahead of what the engine takes

    def sampler(self, sampler: Sampler | BlendedSampler) -> "Sampler | BlendedSampler | _Overheard":
        return _Overheard(sampler, self._drawn) if self._file else sampler

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return self._written(batches) if self._file or self._hold_after else batches

    def _written(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for number, (idx, targets) in enumerate(batches):
            step, accumulation = divmod(number, self._accumulation)
            step += self._first
            if step == self._hold_after > 0:
                threading.Event().wait()
            if self._file:
                samples, windows = self._drawn.popleft()
                tokens = hashlib.sha256(idx.numpy().tobytes() + targets.numpy().tobytes()).hexdigest()
                row = {"step": step, "accumulation": accumulation}
                row |= {"samples": samples, "windows": windows, "tokens": tokens}
                with open(self._file, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            yield idx, targets


class _Overheard:
    """A sampler whose answers are kept, in the order of the micro-batches."""

    def __init__(self, sampler: Sampler | BlendedSampler, drawn: deque):
        self._sampler, self._drawn = sampler, drawn

    def window_of(self, samples: np.ndarray) -> np.ndarray:
        windows = self._sampler.window_of(samples)
        self._drawn.extend(zip(samples.tolist(), windows.tolist(), strict=True))
        return windows
