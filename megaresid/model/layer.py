"""One layer: a mixer and an MLP, called through its sites."""

from functools import partial

import torch
from torch import nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

from megaresid.attention.cache import Cache
from megaresid.model.mlp import MLP
from megaresid.model.plan import ModelPlan
from megaresid.residual.stream import SUBLAYERS, Normed, State


class Layer(nn.Module):
    """Tensors in, tensors out: the stream's state followed by the mixers' side channel, in one flat tuple. Of the side
    channel only what a later layer reads goes on.

    With ``recompute`` only the inputs are kept for the backward pass and the layer runs again there.
    """

    def __init__(self, plan: ModelPlan, index: int, recompute: bool):
        super().__init__()
        variant = plan.residual_of(index)
        self.attention = plan.mixer_of(index)
        self.mlp = MLP(plan.shape)
        self.sites = nn.ModuleDict({place.kind: variant.site(place) for place in variant.places(index)})
        self.state_length = len(variant.state_spec(2 * index))
        self.kept = plan.side_kept(index)
        self.recompute, self.dropout = recompute, plan.shape.dropout

    def forward(self, tensors: State | torch.Tensor, cache: Cache | None = None) -> State:
        tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tensors
        if self.recompute and cache is None and torch.is_grad_enabled():
            return checkpoint(self._run, *tensors, use_reentrant=False)
        return self._run(*tensors, cache=cache)

    def _run(self, *tensors: torch.Tensor, cache: Cache | None = None) -> State:
        state, side = tensors[: self.state_length], tensors[self.state_length :]
        # Sites act on each token alone: only the mixer has anything to carry on.
        attention = self._mix if cache is None else partial(self._mix, cache=cache)
        sublayers = {"attention": attention, "mlp": self.mlp}
        for kind, site in self.sites.items():
            state, side = site(state, side, *(sublayers[name] for name in SUBLAYERS[kind]))
        return (*state, *(side[position] for position in self.kept))

    def _mix(self, x: Normed, side: State, **carried: Cache) -> tuple[torch.Tensor, State]:
        """The mixer with the dropout of a sublayer's output, which no mixer needs to think of."""
        y, side = self.attention(x, side, **carried)
        return dropout(y, self.dropout, self.training), side
