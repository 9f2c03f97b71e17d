"""What is wished for by signal: SIGTERM and SIGINT, to save and leave; SIGUSR1, to save and go on.

A signal reaches one rank or some, at any moment; the ranks agree on it between two steps.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from megaresid.training.supervisor import is_supervised


class Wish(IntEnum):
    NONE = 0
    SAVE = 1
    STOP = 2


class Wishes:
    """What this rank's signals have asked for."""

    def __init__(self):
        self._save = self._stop = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals of this process while the block runs, in its main thread.

        Where nobody supervises the rank, the second SIGTERM or SIGINT ends it at once, with 128 + its number. Under
        ``launch/train.sh`` that is the supervisor's part: a launcher sends SIGTERM to the others when one rank leaves.
        """
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        if number == signal.SIGUSR1:
            self._save = True
            return
        if self._stop and not is_supervised():
            os._exit(128 + number)
        self._stop = True

    def agreed(self) -> Wish:
        """The strongest wish of any rank, on every rank; SAVE is answered once. Called by all between two steps."""
        wish = Wish(_most(Wish.STOP if self._stop else Wish.SAVE if self._save else Wish.NONE))
        if wish is not Wish.NONE:
            self._save = False  # one that arrived meanwhile gets this save too
        return wish

    def agreed_to_stop(self) -> bool:
        """Whether any rank wishes to stop, on every rank; wishes to save are left for ``agreed``. Called by all."""
        return bool(_most(self._stop))


def _most(mine: int) -> int:
    """The largest of the ranks' numbers."""
    import torch
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return mine
    most = torch.tensor(int(mine), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.item()
