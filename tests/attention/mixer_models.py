"""The mixers of a row away from initialisation, and what their definition makes of the same parameters.

A definition is a function ``define(p, x, segment, shape) -> y``, written from the paper with a loop over the tokens and
without the project's code: ``p`` are the mixer's parameters by local name (of a row with several layers those of the
last; of the earlier ones under ``<layer>.<name>``), ``x`` is [B, T, C] or a tuple (x_q, x_k, x_v) of three,
``segment`` int32 [B, T] numbers the documents or is None, and ``y`` [B, T, C] is the sum of the layers' outputs.
``three`` gives the three inputs in either case.
"""

import torch
from mixer_row import Row
from small_models import move_away
from torch import Tensor

from megaresid.attention.cache import Cache
from megaresid.attention.mixer import Inputs, Mixer
from megaresid.model.gpt import GPT, build, canonical_parameters
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape

BATCH, LENGTH = 2, 11
SEGMENT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 3], [4, 5, 5, 5, 5, 5, 5, 5, 5, 6, 6]], dtype=torch.int32)
"""Documents of one token, of many, at both ends; the first line begins in the middle of one."""


def shape_of(row: Row, **changes) -> ModelShape:
    sizes = {"layers": row.layers, "heads": row.heads, "width": row.width, "context": 48, "vocab_size": 40}
    return ModelShape(**sizes | {"end_of_text": 0} | changes)


class Mixers:
    """The mixers of a row's layers, called with one input; their outputs are summed."""

    def __init__(self, row: Row, documents: bool = False, dtype: torch.dtype = torch.float64):
        self.row, self.documents = row, documents
        self.shape = shape_of(row)
        self.plan = ModelPlan(self.shape, row.spec, documents=documents)
        model: GPT = build(self.plan, seed=0).to(dtype)
        parameters = canonical_parameters(model, model.prefixes)
        move_away(parameters, row.away, self.shape.vocab_size)
        self.mixers: list[Mixer] = [model.parts[2 + layer].attention for layer in range(row.layers)]
        self.kept = [model.parts[2 + layer].kept for layer in range(row.layers)]

    def __call__(self, x: Inputs, segment: Tensor | None = None, caches: list[Cache] | None = None) -> Tensor:
        side, total = () if segment is None else (segment,), 0
        for layer, (mixer, kept) in enumerate(zip(self.mixers, self.kept)):
            y, side = mixer(x, side) if caches is None else mixer(x, side, caches[layer])
            side, total = tuple(side[position] for position in kept), total + y
        return total

    def caches(self, length: int) -> list[Cache]:
        return [Cache(length) for _ in self.mixers]

    def parameters(self) -> dict[str, Tensor]:
        """Under the names that a definition gets."""
        last = len(self.mixers) - 1
        return {
            name if layer == last else f"{layer}.{name}": parameter
            for layer, mixer in enumerate(self.mixers)
            for name, parameter in mixer.named_parameters()
        }

    def by_definition(self, x: Inputs, segment: Tensor | None = None) -> Tensor:
        return self.row.define(self.parameters(), x, segment, self.shape)


def inputs(row: Row, length: int = LENGTH, batch: int = BATCH, seed: int = 0) -> Tensor:
    """[B, T, C] of unit variance, as a norm leaves it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, row.width, generator=generator, dtype=torch.float64)


def three(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return x if isinstance(x, tuple) else (x, x, x)
