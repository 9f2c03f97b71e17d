"""Multipliers of a sublayer's output that are not trained: a warm-up of each layer, a power of the depth."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from megaresid.model.init import STD, Constant, Rule, output_projections_at
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading, Values
from megaresid.residual.cost import Cost
from megaresid.residual.stream import RESIDUALS, Place, ResidualVariant, Site, State
from megaresid.spec import Options


class ProResOptions(Options):
    warmup: int = Field(default=1000, ge=1)
    """T: optimizer steps by which each layer takes longer than the one below it; the last is fully on after T x layers
    (24,000 of the default for 24 layers, more than many runs have)."""


class ProResSite(Site):
    """x <- x + alpha f(LN(x)), with alpha a buffer that ``set_step`` fills."""

    def __init__(self, shape: ModelShape, options: ProResOptions, place: Place):
        super().__init__(shape, options, place)
        self.warmup = options.warmup * (place.layer + 1)
        # A function of the step, which the checkpoint holds already.
        self.register_buffer("alpha", torch.zeros(()), persistent=False)

    def set_step(self, step: int) -> None:
        self.alpha.fill_(min(step / self.warmup, 1.0))

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (torch.addcmul(state[0], self.alpha, update),)

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        return {"gate": Values(self.alpha)}


@RESIDUALS.register("pro_res")
class ProRes(ResidualVariant):
    """x <- x + alpha(l, t) f(LN(x)), alpha = min(t / (T l), 1) at step t for both sublayers of layer l = 1..L.

    Chen et al. 2026, arXiv 2603.05369: the linear schedule. t counts optimizer steps, the first of which is 1; an
    evaluation after step t uses alpha(l, t) too, and before the first step the model is the identity. Layer l is fully
    on from step T l: choose T so that T L is well below the run's steps.
    """

    citation = "Chen et al. 2026, arXiv 2603.05369"
    fidelity = "exact"
    Options = ProResOptions
    site_class = ProResSite

    def cost(self, place: Place) -> Cost:
        return Cost(flops=self.shape.width)


class CompletePOptions(Options):
    alpha: float = Field(default=1.0, ge=0.5, le=1)
    """The exponent; 1 is what the paper calls CompleteP."""
    base_layers: int = Field(default=2, ge=1)
    """The depth that the learning rate and the epsilon were chosen for; the paper's is 2."""


class CompletePSite(Site):
    """x <- x + m^-alpha f(LN(x))."""

    def __init__(self, shape: ModelShape, options: CompletePOptions, place: Place):
        super().__init__(shape, options, place)
        self.ratio, self.alpha = shape.layers / options.base_layers, options.alpha
        self.multiplier = self.ratio**-self.alpha

    def parameter_rules(self) -> dict[str, Rule]:
        weight, bias = Rule(Constant(1.0), decay=False), Rule(Constant(0.0), decay=False)
        return {
            "norm.weight": depth_scaled(weight, self.ratio, self.alpha),
            "norm.bias": depth_scaled(bias, self.ratio, self.alpha),
        }

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (torch.add(state[0], update, alpha=self.multiplier),)


def depth_scaled(rule: Rule, ratio: float, alpha: float) -> Rule:
    """The rule of a residual block's parameter when the model is ``ratio`` times as deep as the base."""
    return replace(
        rule,
        lr_multiplier=rule.lr_multiplier * ratio ** (alpha - 1),
        epsilon_multiplier=rule.epsilon_multiplier * ratio**-alpha,
    )


@RESIDUALS.register("complete_p")
class CompleteP(ResidualVariant):
    """x <- x + m^-alpha f(LN(x)), m = L / L_base: Dey et al. 2025, arXiv 2505.01618, table 1, the terms in depth (those
    in width are at their base, m_N = 1).

    In the residual blocks, norms included, learning rates are multiplied by m^(alpha - 1) and AdamW's epsilon by
    m^-alpha; output projections start at N(0, 0.02) like every hidden matrix, without GPT-2's 1 / sqrt(2 L).
    """

    citation = "Dey et al. 2025, arXiv 2505.01618"
    fidelity = "reconstructed: terms in width at their base"
    Options = CompletePOptions
    site_class = CompletePSite

    def sublayer_rule(self, layer: int, name: str, rule: Rule) -> Rule:
        ratio = self.shape.layers / self.options.base_layers
        return depth_scaled(output_projections_at(STD, name, rule), ratio, self.options.alpha)

    def cost(self, place: Place) -> Cost:
        return Cost(flops=self.shape.width)
