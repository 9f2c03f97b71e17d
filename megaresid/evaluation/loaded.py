"""A model that is not being trained, as evaluation sees it."""

import torch

from megaresid.model.gpt import GPT, canonical_parameters


class LoadedModel:
    """A whole ``GPT`` on this rank's device: what an engine is to evaluation, without an optimizer.

    With ranks, each has the whole model and they share the requests (``megaresid.evaluation.scoring``).

    Args:
        model: It is moved to ``device`` and into evaluation mode.
        device: This rank's.
        autocast_dtype: What matrix products run in; None for the parameters' own dtype.
        positions_per_forward: The most positions of one forward, padding included; one sequence is always allowed.
    """

    def __init__(
        self, model: GPT, device: torch.device, autocast_dtype: torch.dtype | None, positions_per_forward: int
    ):
        self.model, self.device, self.autocast_dtype = model.to(device).eval(), torch.device(device), autocast_dtype
        self.context, self.vocab_size = model.shape.context, model.shape.vocab_size
        self.positions_per_forward = positions_per_forward
        self.parameters = canonical_parameters(model, model.prefixes)

    @torch.no_grad()
    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of one micro-batch: a sum over valid targets divided by all positions."""
        with self._autocast():
            return self.model(idx.to(self.device), targets.to(self.device))[1].float()

    @torch.no_grad()
    def score(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``megaresid.training.engine.Engine.score``; no rank waits for another."""
        check_length(idx, self.context)
        with self._autocast():
            return self.model(idx.to(self.device, non_blocking=True), targets, scores=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)


def check_length(idx: torch.Tensor, context: int) -> None:
    """Raises ValueError for sequences [m, T] that are longer than the context, which a model was not trained for."""
    if idx.shape[1] > context:
        raise ValueError(f"sequences of {idx.shape[1]} tokens are longer than the model's context of {context}")
