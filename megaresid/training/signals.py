"""What is wished for by signal: SIGTERM and SIGINT, to save and leave; SIGUSR1, to save and go on.

A signal reaches one rank or some, at any moment; the ranks agree on it between two steps.
"""

import os
import signal
from enum import IntEnum

from megaresid.training.supervisor import is_supervised


class Wish(IntEnum):
    NONE = 0
    SAVE = 1
    STOP = 2


class Wishes:
    """What this rank's signals ask for, from its making on. One a process, made in the main thread.

    Where nobody supervises the rank, the second SIGTERM or SIGINT ends it at once, with 128 + its number. Under
    ``launch/train.sh`` that is the supervisor's part: a launcher sends SIGTERM to the others when one rank leaves.
    """

    def __init__(self):
        self._save = self._stop = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _) -> None:
        if number == signal.SIGUSR1:
            self._save = True
            return
        if self._stop and not is_supervised():
            os._exit(128 + number)
        self._stop = True

    def agreed(self) -> Wish:
        """The strongest wish of any rank, on every rank. Called by all of them between two steps."""
        import torch
        import torch.distributed as dist

        mine = Wish.STOP if self._stop else Wish.SAVE if self._save else Wish.NONE
        if dist.get_world_size() == 1:
            wish = mine
        else:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            strongest = torch.tensor(int(mine), device=device)
            dist.all_reduce(strongest, op=dist.ReduceOp.MAX)
            wish = Wish(strongest.item())
        if wish >= Wish.SAVE:
            self._save = False  # one that arrived meanwhile gets this save too
        return wish
