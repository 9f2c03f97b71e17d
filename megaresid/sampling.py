"""Sampling from a model: which token comes next, and the tokens one after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaresid.attention.cache import ModelCache
from megaresid.errors import UserError
from megaresid.model.gpt import GPT


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; each step acts on what the one before it left.

    The logits are divided by ``temperature`` (0: the likeliest token, no draw). The ``top_k`` likeliest tokens stay (0:
    all). Of these the likeliest stay whose probabilities, renormalised, first reach ``top_p``: the smallest such set,
    at least one token. Of equal tokens the one with the lower id is the likelier.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """One token id from logits [V] on the CPU. Raises UserError where they are not finite."""
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its training has diverged, take an earlier checkpoint")
        if self.temperature == 0:
            return int(logits.argmax())
        ids, probabilities = self.distribution(logits)
        return int(ids[torch.multinomial(probabilities, 1, generator=generator)])

    def distribution(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Ids that may be drawn [n] int64 and their probabilities [n] fp64, from logits [V]; not at temperature 0."""
        ids = torch.arange(logits.numel())
        if 0 < self.top_k < logits.numel():
            least = logits.topk(self.top_k).values[-1]
            ids = _likeliest_first(ids[logits >= least], logits)[: self.top_k]
        elif self.top_p < 1:
            ids = _likeliest_first(ids, logits)
        # The largest is taken away before the division, which overflows at a small temperature.
        shifted = (logits[ids] - logits.max()).double() / self.temperature
        probabilities = shifted.softmax(0)
        if self.top_p < 1:
            kept = 1 + int((probabilities.cumsum(0) < self.top_p).sum())
            ids, probabilities = ids[:kept], probabilities[:kept] / probabilities[:kept].sum()
        return ids, probabilities


def _likeliest_first(ids: Tensor, logits: Tensor) -> Tensor:
    return ids[logits[ids].sort(descending=True, stable=True).indices]


def tokens_seen(model: GPT) -> int | None:
    """How many of a text's last tokens the model sees when it predicts the next; None: all of them.

    A model with learned positions has none beyond its context; and where a mixer cannot go on from what it kept, the
    last context is run again for every token.
    """
    return model.shape.context if model.plan.has_positions or model.init_cache(1) is None else None


def continuation(
    model: GPT,
    ids: Sequence[int],
    tokens: int,
    sampling: Sampling,
    seed: int,
    autocast: torch.dtype | None = None,
) -> Iterator[int]:
    """The tokens that follow ``ids`` (at least one), each as soon as it is drawn.

    Ends after ``tokens`` of them, or where the document ends: <|endoftext|> is not given out. Every token is run once,
    with what the mixers keep of it, as long as the text is no longer than what the model sees; from there on, and where
    a mixer keeps nothing, each step runs all that it sees again. Drawn on the CPU, so that a seed draws alike wherever
    the model is. ``autocast`` is the type of the products, None for that of the parameters.
    """
    ids, seen = list(ids), tokens_seen(model)
    room = len(ids) + tokens if seen is None else seen
    cache = model.init_cache(room)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        if len(ids) > room:
            cache = None
        new = ids[-model.shape.context :] if cache is None else ids[cache.position :]
        token = sampling.choose(_last_logits(model, new, cache, autocast), generator)
        if token == model.shape.end_of_text:
            return
        ids.append(token)
        yield token


@torch.inference_mode()
def _last_logits(model: GPT, ids: list[int], cache: ModelCache | None, autocast: torch.dtype | None) -> Tensor:
    """Logits [V] of the token after ``ids``, on the CPU in fp32 or better.

    With a cache ``ids`` goes on where the last call ended, and is run a context at a time: the logits of a long prompt
    would not fit in memory.
    """
    device = next(model.parameters()).device
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        for piece in torch.tensor([ids], device=device).split(model.shape.context, 1):
            logits, _ = model(piece, cache=cache)
    last = logits[0, -1].cpu()
    return last.to(torch.promote_types(last.dtype, torch.float32))
