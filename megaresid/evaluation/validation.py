"""The loss on a fixed validation set, in a fixed order, whatever the number of ranks."""

import numpy as np
import torch
import torch.distributed
from torch.nn.functional import pad

from megaresid.data.loader import read_batch
from megaresid.data.mixture import Mixture
from megaresid.data.sampler import windows
from megaresid.data.shards import TokenStream
from megaresid.errors import UserError
from megaresid.evaluation.hook import Measurable


def count_windows(stream: TokenStream | Mixture, context: int, tokens: int) -> int:
    """The whole windows in ``tokens`` or in the stream, whichever is less; raises UserError when there is none."""
    found = min(tokens // context, windows(len(stream), context))
    if found < 1:
        raise UserError(
            f"validation needs one window of {context + 1} tokens: the split has {len(stream)} tokens and "
            f"--validation-tokens is {tokens}: give more of either, or --validation-interval 0"
        )
    return found


class Validation:
    """Mean cross-entropy (nats per token) over the first windows of the validation split.

    The windows are those that fit in ``tokens`` (or in the split, if it is smaller). Every rank runs the same number
    of micro-batches; the last ones are padded with windows whose targets count nothing.
    """

    def __init__(
        self,
        stream: TokenStream | Mixture,
        *,
        context: int,
        tokens: int,
        micro_batch: int,
        rank: int,
        ranks: int,
        vocab_size: int,
    ):
        self.stream, self.context, self.micro_batch = stream, context, micro_batch
        self.rank, self.ranks, self.vocab_size = rank, ranks, vocab_size
        self.windows = count_windows(stream, context, tokens)

    def __call__(self, engine: Measurable) -> dict[str, float]:
        total = torch.zeros((), dtype=torch.float64)
        per_round = self.micro_batch * self.ranks
        for start in range(0, self.windows, per_round):
            idx, targets = self._micro_batch(start + self.rank * self.micro_batch)
            total += engine.loss(idx, targets).cpu().double() * targets.numel()
        total = total.to(engine.device)
        torch.distributed.all_reduce(total)
        return {"val_loss": total.item() / (self.windows * self.context)}

    def _micro_batch(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows ``first`` and following; those past the end are zeros with targets of -1."""
        present = np.arange(first, min(first + self.micro_batch, self.windows))
        idx, targets = read_batch(self.stream, present, self.context, self.vocab_size)
        missing = (0, 0, 0, self.micro_batch - len(present))
        return pad(idx, missing), pad(targets, missing, value=-1)
