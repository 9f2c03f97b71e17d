"""Micro-batches of tokens, read ahead by one background thread."""

import queue
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import torch

from megaresid.data.blend import BlendedSampler
from megaresid.data.mixture import Mixture, Stream
from megaresid.data.sampler import Sampler, sample_indices
from megaresid.errors import UserError

Batch = tuple[torch.Tensor, torch.Tensor]

# Groups of micro-batches held ready: enough to hide a slow read, few enough to cost no memory.
AHEAD = 4
# Micro-batches are read and handed over together up to so many tokens: each hand-over wakes a thread.
TOKENS_AT_ONCE = 2**17
# Samples that are permuted in one go: numpy's cost per call is spread over them.
PERMUTED_AT_ONCE = 1024


def read_batch(stream: Stream | Mixture, windows: np.ndarray, context: int, vocab_size: int) -> Batch:
    """``(idx, targets)`` int64[len(windows), context]; targets are the tokens one further on.

    Raises UserError naming shard, token offset, id and vocab_size for an id outside the vocabulary.
    """
    tokens = stream.read_windows(windows, context)
    if tokens.max(initial=0) >= vocab_size:
        row, column = np.argwhere(tokens >= vocab_size)[0].tolist()
        shard, offset = stream.place(int(windows[row]), column, context)
        raise UserError(
            f"{shard}: token {offset} is id {tokens[row, column]}, outside the vocabulary of {vocab_size}; "
            f"check the data with python -m data_prep verify {shard.parent}",
            rank_local=True,
        )
    return torch.from_numpy(tokens[:, :-1].astype(np.int64)), torch.from_numpy(tokens[:, 1:].astype(np.int64))


class Loader:
    """Iterates once over this rank's micro-batches of steps [first_step, last_step), in order.

    Yields ``(idx, targets)`` int64[micro_batch, context], ``accumulation`` of them a step; ``pin`` puts them in
    pinned memory. The order comes from the sampler alone; the thread only reads ahead, and an error in it is raised
    at the batch where it happened. Use as a context manager or call ``close``.
    """

    def __init__(
        self,
        stream: Stream | Mixture,
        sampler: Sampler | BlendedSampler,
        *,
        context: int,
        global_batch: int,
        micro_batch: int,
        ranks: int,
        rank: int,
        vocab_size: int,
        first_step: int = 0,
        last_step: int,
        pin: bool = False,
    ):
        accumulation, rest = divmod(global_batch, ranks * micro_batch)
        if rest or not accumulation:
            raise UserError(
                f"global batch {global_batch} is not a multiple of {ranks} ranks x micro-batch {micro_batch} "
                f"= {ranks * micro_batch} sequences"
            )
        # A new thread's current device is 0, and pinning would open a context there on every rank.
        device = torch.cuda.current_device() if pin else None
        sizes = {"global_batch": global_batch, "ranks": ranks, "micro_batch": micro_batch}
        steps_at_once = max(1, PERMUTED_AT_ONCE // (accumulation * micro_batch))
        at_once = max(1, TOKENS_AT_ONCE // (micro_batch * context))

        def read(windows: np.ndarray) -> list[Batch]:
            """The micro-batches of int64[groups, micro_batch] windows."""
            batch = read_batch(stream, windows.reshape(-1), context, vocab_size)
            batch = [tensor.pin_memory() for tensor in batch] if pin else batch
            return list(zip(*(tensor.split(micro_batch) for tensor in batch), strict=True))

        # The thread must not hold this object, or dropping the last reference to it would never end the thread.
        def groups() -> Iterator[list[Batch]]:
            if pin:
                torch.cuda.set_device(device)
            for block in range(first_step, last_step, steps_at_once):
                steps = range(block, min(block + steps_at_once, last_step))
                samples = [sample_indices(step, a, rank, **sizes) for step in steps for a in range(accumulation)]
                windows = sampler.window_of(np.stack(samples))
                for first in range(0, len(windows), at_once):
                    group = windows[first : first + at_once]
                    try:
                        yield read(group)
                    except UserError:
                        # Those before the one that cannot be read come as if nothing were wrong.
                        yield from (read(group[row : row + 1]) for row in range(len(group)))

        self._ready: queue.Queue = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_read_ahead, args=(groups(), self._ready, self._stop), name="loader", daemon=True
        )
        self._group: Iterator[Batch] = iter(())
        self._finished = False
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._finished:
            raise StopIteration
        for batch in self._group:
            return batch
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._group = iter(item)
        return next(self._group)

    def close(self) -> None:
        """End the thread; what it has read ahead is dropped."""
        self._finished = True
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _read_ahead(groups: Iterator[list[Batch]], ready: queue.Queue, stop: threading.Event) -> None:
    """Put every group, then the exception that ended them: StopIteration at the end of the data."""
    while not stop.is_set():
        try:
            item = next(groups)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
