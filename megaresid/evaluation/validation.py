"""The loss on a fixed validation set, in a fixed order, whatever the number of ranks."""

import math

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import pad

from megaresid.data.loader import read_batch
from megaresid.data.manifest import Tokenizer
from megaresid.data.mixture import Mixture, RunData
from megaresid.data.sampler import windows
from megaresid.data.shards import TokenStream
from megaresid.errors import UserError
from megaresid.evaluation.hook import Measurable
from megaresid.model.presets import ModelShape


def count_windows(stream: TokenStream | Mixture, context: int, tokens: int) -> int:
    """The whole windows in ``tokens`` or in the stream, whichever is less; raises UserError when there is none."""
    found = min(tokens // context, windows(len(stream), context))
    if found < 1:
        raise UserError(
            f"validation needs one window of {context + 1} tokens: the split has {len(stream)} tokens and "
            f"--validation-tokens is {tokens}: give more of either, or leave validation out of --eval"
        )
    return found


def bytes_of_ids(tokenizer: Tokenizer) -> torch.Tensor | None:
    """int64[vocab_size]: the bytes of UTF-8 text that each id stands for, none for <|endoftext|>.

    None for another tokenizer than GPT-2's, and where its vocabulary is not to be had.
    """
    from data_prep.tokenizer import END_OF_TEXT, RANKS_SHA256, gpt2_encoding

    if tokenizer.sha256 != RANKS_SHA256:
        return None
    try:
        encoding = gpt2_encoding()
    except UserError:
        return None
    lengths = [len(encoding.decode_single_token_bytes(id)) for id in range(encoding.n_vocab)]
    lengths[END_OF_TEXT] = 0
    return torch.tensor(lengths)


def validation_of(data: RunData, shape: ModelShape, tokens: int) -> "Validation":
    """The validation of a run on its own data; raises UserError where it has not one window."""
    return Validation(
        data.validation(shape.context, tokens),
        context=shape.context,
        tokens=tokens,
        vocab_size=shape.vocab_size,
        bytes_of_ids=bytes_of_ids(data.folders[0].manifest.content.tokenizer),
    )


class Validation:
    """Mean cross-entropy over the first windows of the validation split: ``val_loss`` in nats per token and, where the
    ids' bytes are known, ``val_bits_per_byte``, which models of different tokenizers can be compared by:

        sum of nats over all targets / (ln 2 x bytes of all targets)

    where <|endoftext|> costs its nats and has no bytes. The windows are those that fit in ``tokens`` (or in the split,
    if it is smaller). Every rank runs the same number of micro-batches; the last ones are padded with windows whose
    targets count nothing.
    """

    def __init__(
        self,
        stream: TokenStream | Mixture,
        *,
        context: int,
        tokens: int,
        vocab_size: int,
        bytes_of_ids: torch.Tensor | None = None,
    ):
        self.stream, self.context, self.vocab_size = stream, context, vocab_size
        self.bytes_of_ids = bytes_of_ids
        self.windows = count_windows(stream, context, tokens)

    def __call__(self, engine: Measurable) -> dict[str, float]:
        several = dist.is_initialized()
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        micro_batch = max(1, engine.positions_per_forward // self.context)
        totals, problem = torch.zeros(2, dtype=torch.float64), None  # nats and bytes
        for start in range(0, self.windows, micro_batch * ranks):
            try:
                idx, targets = self._micro_batch(start + rank * micro_batch, micro_batch)
            except UserError as error:  # of one rank's own windows: raised when no rank waits for it any more
                problem = error
                idx = torch.zeros(micro_batch, self.context, dtype=torch.int64)
                targets = idx - 1
            totals[0] += engine.loss(idx, targets).cpu().double() * targets.numel()
            if self.bytes_of_ids is not None:
                totals[1] += self.bytes_of_ids[targets[targets >= 0]].sum()
        if several:
            totals = totals.to(engine.device)
            dist.all_reduce(totals)
        if problem:
            raise problem
        nats, text_bytes = totals.tolist()
        found = {"val_loss": nats / (self.windows * self.context)}
        if text_bytes:
            found["val_bits_per_byte"] = nats / (math.log(2) * text_bytes)
        return found

    def _micro_batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` windows from ``first`` on; those past the end are zeros with targets of -1."""
        present = np.arange(first, min(first + count, self.windows))
        idx, targets = read_batch(self.stream, present, self.context, self.vocab_size)
        missing = (0, 0, 0, count - len(present))
        return pad(idx, missing), pad(targets, missing, value=-1)
