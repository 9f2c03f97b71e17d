"""Where the norms stand: one stream, in which variants differ from pre-LN by its norms and its fixed scales alone.

Every norm is the model's LayerNorm with weight and bias, so that only the placement is compared, also where a paper's
norms have neither mean nor bias (Peri-LN, KEEL, LayerNorm scaling).
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megaresid.model.init import STD, Rule, XavierNormal, output_projections_at
from megaresid.model.presets import ModelShape
from megaresid.residual.cost import Cost, norm_cost
from megaresid.residual.stream import RESIDUALS, BareClose, Opening, Place, ResidualVariant, Site, State
from megaresid.spec import Options

LAYER_NORM = "reconstructed: LayerNorm with weight and bias for the paper's RMSNorm"


class NormPlacement(ResidualVariant):
    """Its output projections start like any other matrix.

    GPT-2 divides their start by sqrt(2 layers) because pre-LN adds up the updates of all depths as they are; here a
    norm or a scale sees to it.
    """

    def sublayer_rule(self, layer: int, name: str, rule: Rule) -> Rule:
        return output_projections_at(STD, name, rule)


class NormedStream(NormPlacement):
    """Its last site leaves a normed stream, which the head reads as it is."""

    close_class = BareClose

    def closing_cost(self) -> Cost:
        width = self.shape.width
        return Cost(parameters=-2 * width, flops=-7 * width, saved=-2, written=-width)


class PostSite(Site):
    """x <- LN(alpha x + f(x))."""

    alpha = 1.0

    def enter(self, state: State) -> tuple[torch.Tensor, Any]:
        return state[0], None

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (self.norm(torch.add(update, state[0], alpha=self.alpha)),)


@RESIDUALS.register("post_ln")
class PostLN(NormedStream):
    """x <- LN(x + f(x)), without a final norm: section 3.1 of the paper."""

    citation = "Vaswani et al. 2017, arXiv 1706.03762"
    fidelity = "exact"
    site_class = PostSite


class DeepNormSite(PostSite):
    def __init__(self, shape: ModelShape, options: Options, place: Place):
        super().__init__(shape, options, place)
        self.alpha = (2 * shape.layers) ** 0.25


@RESIDUALS.register("deep_norm")
class DeepNorm(PostLN):
    """x <- LN(alpha x + f(x)) with alpha = (2 layers)^(1/4), without a final norm: figure 2, for decoders.

    Matrices start Xavier normal, with gain beta = (8 layers)^(-1/4) for the values, the output projection and both of
    the MLP, and gain 1 for queries and keys.
    """

    citation = "Wang et al. 2022, arXiv 2203.00555"
    fidelity = "exact"
    site_class = DeepNormSite

    def sublayer_rule(self, layer: int, name: str, rule: Rule) -> Rule:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return replace(rule, start=XavierNormal(gain=1.0))
        if name.endswith(("v_proj.weight", "o_proj.weight", "mlp.fc.weight", "mlp.proj.weight")):
            return replace(rule, start=XavierNormal(gain=(8 * self.shape.layers) ** -0.25))
        return rule

    def cost(self, place: Place) -> Cost:
        return Cost(flops=self.shape.width)


class SandwichSite(Site):
    """x <- x + LN_out(f(LN(x)))."""

    def __init__(self, shape: ModelShape, options: Options, place: Place):
        super().__init__(shape, options, place)
        self.norm_out = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        # Under autocast the update is bf16 and its norm would be too; the stream stays fp32.
        return (state[0] + self.norm_out(update.to(state[0].dtype)),)


@RESIDUALS.register("sandwich")
class Sandwich(NormPlacement):
    """x <- x + LN_out(f(LN(x))), with a final LN: the paper's Sandwich-LN.

    At initialisation an update has unit variance in each channel, far above that of GPT-2's embeddings.
    """

    citation = "Ding et al. 2021, arXiv 2105.13290"
    fidelity = "exact"
    site_class = SandwichSite

    def cost(self, place: Place) -> Cost:
        return norm_cost(self.shape.width)


class NormedOpening(Opening):
    """x = LN(x0)."""

    def __init__(self, shape: ModelShape, options: Options):
        super().__init__(shape, options)
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)

    def forward(self, x0: torch.Tensor) -> State:
        return (self.norm(x0),)


@RESIDUALS.register("peri_ln")
class PeriLN(Sandwich):
    """x_0 <- LN(x_0), then x <- x + LN_out(f(LN(x))), with a final LN.

    The paper calls the norm of the embeddings optional; without it this is ``sandwich``.
    """

    citation = "Kim et al. 2025, arXiv 2502.02732"
    fidelity = LAYER_NORM
    opening_class = NormedOpening

    def opening_cost(self) -> Cost:
        width = self.shape.width
        return Cost(parameters=2 * width, flops=7 * width, saved=2, written=width)


class KeelSite(Site):
    """x <- LN_out(alpha x + f(LN(x))); alpha = 1 in the first layer."""

    def __init__(self, shape: ModelShape, options: Options, place: Place):
        super().__init__(shape, options, place)
        self.norm_out = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)
        self.alpha = 2.0 * shape.layers if place.layer else 1.0

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (self.norm_out(torch.add(update, state[0], alpha=self.alpha)),)


@RESIDUALS.register("keel")
class Keel(NormedStream):
    """x <- LN_out(alpha x + f(LN(x))) with alpha the number of sublayers, without a final norm: equation 8.

    The first layer has no alpha, and its attention no LN_out: it is pre-LN (section 3.1 and figure 2).
    """

    citation = "Chen and Wei 2026, arXiv 2601.19895"
    fidelity = LAYER_NORM

    def site(self, place: Place) -> Site:
        return (KeelSite if place.index else Site)(self.shape, self.options, place)

    def cost(self, place: Place) -> Cost:
        if not place.index:
            return Cost()
        return norm_cost(self.shape.width) + Cost(flops=self.shape.width if place.layer else 0)


class ScaledNormSite(Site):
    """x <- x + f(LN(x) / sqrt(l)) in layer l, counted from 1."""

    def __init__(self, shape: ModelShape, options: Options, place: Place):
        super().__init__(shape, options, place)
        self.scale = 1 / math.sqrt(place.layer + 1)

    def enter(self, state: State) -> tuple[torch.Tensor, Any]:
        normed, context = super().enter(state)
        return normed * self.scale, context


@RESIDUALS.register("layer_norm_scaling")
class LayerNormScaling(NormPlacement):
    """x <- x + f(LN(x) / sqrt(l)) in both sublayers of layer l, counted from 1, with a final LN: section 4.

    It is meant to be used without GPT-2's scaled start of the output projections (the paper's footnote 1).
    """

    citation = "Sun et al. 2025, arXiv 2502.05795"
    fidelity = LAYER_NORM
    site_class = ScaledNormSite

    def cost(self, place: Place) -> Cost:
        return Cost(flops=self.shape.width)
