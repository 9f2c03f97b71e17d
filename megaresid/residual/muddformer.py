"""MUDDFormer: each of a layer's inputs is its own average over the earlier layers, weighted anew for every token."""

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import gelu, linear

from megaresid.model.init import Constant, Normal, Rule, Values
from megaresid.model.presets import ModelShape
from megaresid.readings import Depth, Reading
from megaresid.residual.cost import Cost, norm_cost
from megaresid.residual.history import block_name, layer_source
from megaresid.residual.stream import (
    RESIDUALS,
    Close,
    Entry,
    Normed,
    Place,
    ResidualVariant,
    Site,
    State,
    StateSpec,
    recomputed,
)
from megaresid.residual.sums import weighted_sum, weighted_sum_flops
from megaresid.spec import Options

WAYS = ("q", "k", "v", "r")
"""Inputs of a layer: those of attention's three projections, and the residual to which its output is added."""
NORM_EPSILON = 1e-6
HIDDEN_MULTIPLE = 64
LAST_EXPANSION = 4
"""By how much the hidden width behind the last layer, which has one way, is multiplied."""


def hidden_width(ways: int, sources: int, expansion: int) -> int:
    """As in the released training code: to the next multiple of 64, also from a multiple of 64."""
    return (expansion * ways * sources // HIDDEN_MULTIPLE + 1) * HIDDEN_MULTIPLE


class DepthAggregate(nn.Module):
    """X^c = sum_j (a_cj + d_cj) X_j for every way c, where d = W_2 GELU(W_1 RMSNorm(X_newest)) [B, T, ways, sources].

    The RMSNorm has no scale. It is a number per token, so it is multiplied to W_1 X instead of X.
    """

    def __init__(self, width: int, ways: int, sources: int, expansion: int = 1):
        super().__init__()
        hidden = hidden_width(ways, sources, expansion)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, ways * sources, bias=False)
        self.static = nn.Parameter(torch.empty(ways, sources))

    def parameter_rules(self) -> dict[str, Rule]:
        ways, sources = self.static.shape
        newest = (0.0,) * (sources - 1) + (1.0,)
        return {
            "w1.weight": Rule(Normal(1 / math.sqrt(self.w1.in_features)), decay=True),
            "w2.weight": Rule(Constant(0.0), decay=True, fp32=True),
            "static": Rule(Values(newest * ways), decay=False, fp32=True),
        }

    def weights(self, newest: torch.Tensor) -> torch.Tensor:
        """a + d [B, T, ways, sources] in fp32 from X_newest [B, T, C]. Only the product with W_1 follows autocast."""
        dtype = torch.promote_types(newest.dtype, torch.float32)
        hidden = self.w1(newest).to(dtype)
        with torch.autocast(newest.device.type, enabled=False):
            norm = torch.linalg.vector_norm(newest, dim=-1, keepdim=True, dtype=dtype)
            scale = torch.rsqrt(norm.square() / newest.shape[-1] + NORM_EPSILON)
            dynamic = linear(gelu(hidden * scale), self.w2.weight.to(dtype))
            return dynamic.unflatten(-1, self.static.shape) + self.static.to(dtype)

    def forward(self, history: State) -> list[torch.Tensor]:
        """The history X_0 ... X_newest, [B, T, C] each -> one tensor [B, T, C] a way."""
        ways = self.weights(history[-1]).unbind(-2)
        return [weighted_sum(way.unsqueeze(-2).unbind(-1), history) for way in ways]

    def diagnose(self, history: State) -> list[Depth]:
        """The weights of every way."""
        sources = tuple(map(layer_source, range(len(history))))
        return [Depth(way, sources) for way in self.weights(history[-1]).unbind(-2)]


class FirstAttentionSite(Site):
    """The first layer's attention: there is nothing to average. Its input stays, as the history's first."""

    def write(self, state: State, context: None, normed: Normed, update: torch.Tensor) -> State:
        return (state[0] + update, *state)


class AttentionSite(Site):
    """Attention with an input of its own, and a norm of its own, for each of q, k and v. The averages are computed
    again in the backward pass: they are many, and cheap."""

    def __init__(self, shape: ModelShape, options: Options, place: Place):
        super().__init__(shape, options, place)
        # A bias before the keys adds the same to all scores of a query: the softmax would leave it without a gradient.
        self.norm = nn.ModuleDict(
            {way: nn.LayerNorm(shape.width, eps=shape.norm_epsilon, bias=way != "k") for way in WAYS[:-1]}
        )
        self.aggregate = DepthAggregate(shape.width, len(WAYS), place.layer + 1)

    def enter(self, state: State) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        *normed, residual = recomputed(self._inputs, *state)
        return tuple(normed), residual

    def _inputs(self, *history: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *inputs, residual = self.aggregate(history)
        return (*(norm(x) for norm, x in zip(self.norm.values(), inputs)), residual)

    def write(self, state: State, context: torch.Tensor, normed: Normed, update: torch.Tensor) -> State:
        return (context + update, *state)

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        return {f"depth_{way}": depth for way, depth in zip(WAYS, self.aggregate.diagnose(state), strict=True)}


class MLPSite(Site):
    """The MLP is pre-LN; what it gives is the layer's output, the newest of the history."""

    def write(self, state: State, context: None, normed: Normed, update: torch.Tensor) -> State:
        return (*state[1:], state[0] + update)


class MuddClose(Close):
    """One more average, then the final norm."""

    essential = True

    def __init__(self, shape: ModelShape, options: Options, state_length: int):
        super().__init__(shape, options, state_length)
        self.aggregate = DepthAggregate(shape.width, 1, shape.layers + 1, LAST_EXPANSION)

    def forward(self, tensors: State) -> torch.Tensor:
        return recomputed(self._hidden, *tensors[: self.state_length])

    def _hidden(self, *history: torch.Tensor) -> torch.Tensor:
        (x,) = self.aggregate(history)
        return self.norm(x)

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        (depth,) = self.aggregate.diagnose(state)
        return {"depth": depth}


@RESIDUALS.register("mudd_former")
class MuddFormer(ResidualVariant):
    """X_l = r + attn(q, k, v) + mlp: every layer reads four averages over X_0 ... X_{l-1}, for q, k, v and r.

    Xiao et al. 2025, arXiv 2502.12170, with separate norms of q, k and v, and without the optional norms before and
    after the averages. What the paper leaves to the code (hidden widths, initial values) is the released training
    code's. W_2 starts at 0 and a at the newest: vanilla to rounding. Between layers the state is the history alone,
    X_0 ... X_l.
    """

    citation = "Xiao et al. 2025, arXiv 2502.12170"
    fidelity = (
        "reconstructed: hidden widths and starts from the released code; no bias in the key's norm; LayerNorm for "
        "RMSNorm; optional norms left out"
    )
    equals_vanilla = "exactly"
    ways = True
    close_class = MuddClose

    def site(self, place: Place) -> Site:
        site_class = {"attention": AttentionSite if place.layer else FirstAttentionSite, "mlp": MLPSite}[place.kind]
        return site_class(self.shape, self.options, place)

    def state_spec(self, index: int) -> StateSpec:
        layer, inside = divmod(index, 2)
        names = ["x"] * inside + [block_name(block) for block in range(layer + 1)]
        return tuple(Entry(name, (self.shape.width,)) for name in names)

    def cost(self, place: Place) -> Cost:
        if place.kind == "mlp" or place.layer == 0:
            return Cost()
        norms = norm_cost(self.shape.width) * 2 + Cost(parameters=-self.shape.width)  # beside vanilla's; no bias for k
        kept = 2 * self.shape.width - 2  # q, k and v normed; not the inputs of the norms, nor their mean and deviation
        return self._aggregate_cost(len(WAYS), place.layer + 1) + norms._replace(saved=kept)

    def closing_cost(self) -> Cost:
        return self._aggregate_cost(1, self.shape.layers + 1, LAST_EXPANSION) + Cost(saved=-2)

    def _aggregate_cost(self, ways: int, sources: int, expansion: int = 1) -> Cost:
        width, hidden, weights = self.shape.width, hidden_width(ways, sources, expansion), ways * sources
        products = hidden * (width + weights)
        return Cost(
            parameters=products + weights,
            flops=2 * products + 2 * width + 2 * hidden + weights + ways * weighted_sum_flops(sources, width),
        )
