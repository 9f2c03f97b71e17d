"""One layer: a mixer and an MLP, each called through its site."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megaresid.model.mlp import MLP
from megaresid.model.plan import ModelPlan
from megaresid.residual.stream import Place, State

SUBLAYERS = ("attention", "mlp")


class Layer(nn.Module):
    """Tensors in, tensors out: the stream's state followed by the mixers' side channel, in one flat tuple.

    With ``recompute`` only the inputs are kept for the backward pass and the layer runs again there.
    """

    def __init__(self, plan: ModelPlan, index: int, recompute: bool):
        super().__init__()
        variant = plan.residual_of(index)
        self.attention = plan.mixer_of(index)
        self.mlp = MLP(plan.shape)
        self.sites = nn.ModuleDict(
            {
                kind: variant.site(Place(len(SUBLAYERS) * index + offset, index, kind))
                for offset, kind in enumerate(SUBLAYERS)
            }
        )
        self.state_length = len(variant.state_spec(len(SUBLAYERS) * index))
        self.recompute = recompute

    def forward(self, tensors: State | torch.Tensor) -> State:
        tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tensors
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, *tensors, use_reentrant=False)
        return self._run(*tensors)

    def _run(self, *tensors: torch.Tensor) -> State:
        state, side = tensors[: self.state_length], tensors[self.state_length :]
        for kind in SUBLAYERS:
            state, side = self.sites[kind](state, getattr(self, kind), side)
        return (*state, *side)
