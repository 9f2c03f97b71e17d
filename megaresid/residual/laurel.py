"""LAuReL, the learned augmented residual layer: Menghani, Kumar and Kumar 2025, arXiv 2411.07501.

x <- alpha f(x) + g(x, earlier x) (equation 2), with three choices of the linear map g.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from megaresid import readings
from megaresid.errors import UserError
from megaresid.model.init import Constant, Rule, Values
from megaresid.model.presets import ModelShape
from megaresid.residual.cost import Cost
from megaresid.residual.history import EMBED, sublayer_source
from megaresid.residual.stream import RESIDUALS, Entry, Place, ResidualVariant, Site, State, StateSpec
from megaresid.spec import Options

CITATION = "Menghani et al. 2025, arXiv 2411.07501"
BOUNDS = {"softmax": partial(torch.softmax, dim=0), "sigmoid": torch.sigmoid}


class WeightOptions(Options):
    bound: Literal["softmax", "sigmoid"] = "softmax"
    """What keeps alpha and beta from growing without bound: a softmax over the two, or a sigmoid of each."""
    scale: float = Field(default=2.0, gt=0)
    """Factor of the bound, from logits 0: with 2 both weights start at 1, with 1 (the bound as it is) at 1/2."""


class WeightSite(Site):
    def __init__(self, shape: ModelShape, options: WeightOptions, place: Place):
        super().__init__(shape, options, place)
        self.bound, self.scale = BOUNDS[options.bound], options.scale
        self.logits = nn.Parameter(torch.empty(2))

    def parameter_rules(self) -> dict[str, Rule]:
        return {"logits": Rule(Constant(0.0), decay=False, fp32=True)}

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and beta, [1] each: a 0-dim weight would leave a bf16 update in bf16."""
        return (self.scale * self.bound(self.logits)).split(1)

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        alpha, beta = self.weights()
        return (beta * state[0] + alpha * update,)

    def diagnose(self, state: State) -> Mapping[str, readings.Reading]:
        alpha, beta = self.weights()
        return {"gate": readings.Values(alpha), "skip": readings.Values(beta)}


@RESIDUALS.register("laurel_rw")
class LaurelWeights(ResidualVariant):
    """x <- alpha f(LN(x)) + beta x, alpha and beta one bounded number each a sublayer: section 2.1 (LAuReL-RW)."""

    citation = CITATION
    fidelity = "reconstructed: the bound (a softmax or a sigmoid), its scale and its start"
    Options = WeightOptions
    site_class = WeightSite

    @property
    def equals_vanilla(self) -> str:
        return "exactly" if self.options.scale == 2 else "no"

    def cost(self, place: Place) -> Cost:
        return Cost(parameters=2, flops=2 * self.shape.width, saved=self.shape.width)  # kept: the update, for alpha


class RankOptions(Options):
    rank: int = Field(default=4, ge=1)
    """Rank r of the product B A (the paper's 1B model has 4, its 4B model 64)."""


class LowRank(nn.Module):
    """B A x of rank r: A [r, C], B [C, r], starting from zero (footnote 2 of the paper, its language models).

    The rows of A are orthogonal: A_ji = 1/sqrt(r C) where i mod r = j, else 0; B is 0.
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.A = nn.Linear(width, rank, bias=False)
        self.B = nn.Linear(rank, width, bias=False)

    def parameter_rules(self) -> dict[str, Rule]:
        rank, width = self.A.weight.shape
        entry = 1 / math.sqrt(rank * width)
        rows = tuple(entry if i % rank == j else 0.0 for j in range(rank) for i in range(width))
        return {"A.weight": Rule(Values(rows), decay=True), "B.weight": Rule(Constant(0.0), decay=True)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.B(self.A(x))


class LowRankSite(Site):
    def __init__(self, shape: ModelShape, options: RankOptions, place: Place):
        super().__init__(shape, options, place)
        self.map = LowRank(shape.width, options.rank)

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (state[0] + update + self.map(state[0]),)


class _LowRankVariant(ResidualVariant):
    def __init__(self, shape: ModelShape, options: RankOptions):
        super().__init__(shape, options)
        if options.rank > shape.width:
            raise UserError(
                f"residual {self.name!r}: rank={options.rank} is above the width {shape.width}: the rest would never "
                "train"
            )


@RESIDUALS.register("laurel_lr")
class LaurelLowRank(_LowRankVariant):
    """x <- f(LN(x)) + B A x + x with A [r, C], B [C, r]: equation 3 (LAuReL-LR)."""

    citation = CITATION
    fidelity = "exact"
    Options = RankOptions
    equals_vanilla = "exactly"
    site_class = LowRankSite

    def cost(self, place: Place) -> Cost:
        width, rank = self.shape.width, self.options.rank
        return Cost(parameters=2 * rank * width, flops=4 * rank * width + width, saved=rank)


class PreviousOptions(RankOptions):
    previous: int = Field(default=3, ge=1)
    """How many activations k are mapped: the sublayer's own input and the k - 1 before it."""


class WeightedLowRank(LowRank):
    """sum_j gamma_j B A x_j of ``count`` activations x_j; gamma starts at 1/count."""

    def __init__(self, width: int, rank: int, count: int):
        super().__init__(width, rank)
        self.gamma = nn.Parameter(torch.empty(count))

    def parameter_rules(self) -> dict[str, Rule]:
        return super().parameter_rules() | {"gamma": Rule(Constant(1 / len(self.gamma)), decay=False, fp32=True)}

    def forward(self, activations: State) -> torch.Tensor:
        # A comes before the sum over j, so that r numbers of each x_j are kept for gamma's gradient and not C.
        newest, *others = (gamma * self.A(x) for gamma, x in zip(self.gamma.split(1), activations, strict=True))
        for other in others:
            newest = newest + other
        with torch.autocast(newest.device.type, enabled=False):  # it would round the weighted sum, and gamma with it
            return self.B(newest)


class PreviousSite(Site):
    def __init__(self, shape: ModelShape, options: PreviousOptions, place: Place):
        super().__init__(shape, options, place)
        self.map = WeightedLowRank(shape.width, options.rank, activations_at(shape, options, place.index))
        self.kept = activations_at(shape, options, place.index + 1) - 1
        oldest = place.index + 1 - len(self.map.gamma)
        self.sources = tuple(sublayer_source(i - 1) if i else EMBED for i in range(oldest, place.index + 1))

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (state[0] + update + self.map(state), *state[: self.kept])

    def diagnose(self, state: State) -> Mapping[str, readings.Reading]:
        """gamma: the weights of the streams after earlier sublayers, here the oldest first."""
        return {"depth": readings.Depth(self.map.gamma.flip(0), self.sources)}


def activations_at(shape: ModelShape, options: PreviousOptions, index: int) -> int:
    """How many activations enter sublayer ``index``; the close takes one."""
    return min(options.previous, index + 1) if index < 2 * shape.layers else 1


@RESIDUALS.register("laurel_pa")
class LaurelPrevious(_LowRankVariant):
    """x_{i+1} = f(LN(x_i)) + x_i + sum_{j<k} gamma_ij B_i A_i x_{i-j}, i over sublayers: equation 4 (LAuReL-PA).

    The first sublayers have fewer activations behind them, and as many gammas.
    """

    citation = CITATION
    fidelity = "reconstructed: k, and the start of gamma"
    Options = PreviousOptions
    equals_vanilla = "exactly"
    site_class = PreviousSite

    def state_spec(self, index: int) -> StateSpec:
        count = activations_at(self.shape, self.options, index)
        return tuple(Entry(f"x-{j}" if j else "x", (self.shape.width,)) for j in range(count))

    def cost(self, place: Place) -> Cost:
        width, rank = self.shape.width, self.options.rank
        count = activations_at(self.shape, self.options, place.index)
        return Cost(
            parameters=2 * rank * width + count,
            flops=2 * rank * width * (count + 1) + rank * (2 * count - 1) + width,
            saved=rank * (count + 1),
        )
