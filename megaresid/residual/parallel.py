"""Layers whose attention and MLP read the stream at one place and write to it at once."""

from collections.abc import Mapping

import torch
from torch import nn

from megaresid.model.init import Constant, Rule
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading, Values
from megaresid.residual.cost import Cost
from megaresid.residual.stream import RESIDUALS, Place, ResidualVariant, Site, State
from megaresid.spec import Options


class ParallelSite(Site):
    """x <- x + attention(LN(x)) + mlp(LN(x)), with one LN."""

    def forward(self, state: State, side: State, attention: nn.Module, mlp: nn.Module) -> tuple[State, State]:
        normed, _ = self.enter(state)
        attended, side = attention(normed, side)
        update, side = mlp(normed, side)
        # In this order no sum is bf16 under autocast.
        return (state[0] + attended + update,), side


@RESIDUALS.register("parallel")
class Parallel(ResidualVariant):
    """x <- x + attention(LN(x)) + mlp(LN(x)), with one LN a layer: PaLM, section 2; first in GPT-J."""

    citation = "Wang and Komatsuzaki 2021, GPT-J-6B; Chowdhery et al. 2022, arXiv 2204.02311"
    fidelity = "exact"
    kinds = ("parallel",)
    site_class = ParallelSite

    def cost(self, place: Place) -> Cost:
        width = self.shape.width
        return Cost(parameters=-2 * width, flops=-7 * width, saved=-(width + 2), written=-width)


class RescaledParallelSite(ParallelSite):
    """x <- x + attention(LN_1(x)) + s mlp(LN_2(LN_1(x)))."""

    def __init__(self, shape: ModelShape, options: Options, place: Place):
        super().__init__(shape, options, place)
        self.norm_mlp = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)
        self.scale = nn.Parameter(torch.empty(1))

    def parameter_rules(self) -> dict[str, Rule]:
        return {"scale": Rule(Constant(1.0), decay=False, fp32=True)}

    def forward(self, state: State, side: State, attention: nn.Module, mlp: nn.Module) -> tuple[State, State]:
        normed, _ = self.enter(state)
        attended, side = attention(normed, side)
        update, side = mlp(self.norm_mlp(normed), side)
        return (torch.addcmul(state[0] + attended, self.scale, update.to(state[0].dtype)),), side

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        return {"gate": Values(self.scale)}


@RESIDUALS.register("parallel_rescaled")
class RescaledParallel(Parallel):
    """x <- x + attention(LN_1(x)) + s mlp(LN_2(LN_1(x))), s one learnable number a layer that starts at 1."""

    citation = "this project"
    fidelity = "own"
    site_class = RescaledParallelSite

    def cost(self, place: Place) -> Cost:
        width = self.shape.width
        return Cost(parameters=1, flops=width, saved=width, written=-width)
