"""A model as evaluation sees it, by definition: all logits, log_softmax and argmax."""

import torch
from small_models import model_of

from megaresid.model.gpt import GPT, canonical_parameters
from megaresid.model.presets import ModelShape


def bytes_model(context: int, **options) -> GPT:
    """A small model over the 257 tokens of ``eval_data.BYTES``, fp64 unless told, away from initialisation."""
    shape = ModelShape(layers=2, heads=2, width=16, context=context, vocab_size=257, end_of_text=256)
    return model_of("vanilla", shape, **options)


class FullLogits:
    """A ``Measurable`` over a whole model on the CPU; ``shapes`` are those of the calls of ``score``."""

    device = torch.device("cpu")

    def __init__(self, model: GPT, positions_per_forward: int):
        self.model = model.eval()
        self.context, self.vocab_size = model.shape.context, model.shape.vocab_size
        self.positions_per_forward = positions_per_forward
        self.parameters = canonical_parameters(model, model.prefixes)
        self.shapes: list[tuple[int, ...]] = []

    @torch.no_grad()
    def logits(self, idx: torch.Tensor) -> torch.Tensor:
        """[m, T] to [m, T, vocab_size]."""
        assert idx.shape[1] <= self.context
        return self.model(idx)[0]

    @torch.no_grad()
    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model(idx, targets)[1]

    def score(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.shapes.append(tuple(idx.shape))
        logits = self.logits(idx)
        targets = targets.reshape(*idx.shape, -1)
        log_p = logits.log_softmax(-1).gather(-1, targets.clamp(min=0))
        wanted = targets >= 0
        return log_p[wanted], (logits.argmax(-1, keepdim=True) == targets)[wanted]
