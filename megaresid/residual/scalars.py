"""Learned scales of a sublayer's output: one number, one a channel, or one that the normed input modulates."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megaresid.model.init import STD, Constant, Normal, Rule, output_projections_at
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading, Values
from megaresid.residual.cost import Cost
from megaresid.residual.stream import RESIDUALS, BareClose, Close, Place, ResidualVariant, Site, State
from megaresid.spec import Options


class ReZeroOptions(Options):
    norm: bool = True
    """Keep pre-LN's norms, those of the sublayers and the final one; the paper drops them (false)."""


class SkipInitOptions(Options):
    norm: bool = False
    """Keep pre-LN's norms, those of the sublayers and the final one, which the paper drops."""


NormOptions = ReZeroOptions | SkipInitOptions


def norm_or_nothing(shape: ModelShape, options: NormOptions) -> nn.Module:
    return nn.LayerNorm(shape.width, eps=shape.norm_epsilon) if options.norm else nn.Identity()


class ScaledSite(Site):
    """x <- x + g f(LN(x)), with g [1] or [C] that starts at ``start``."""

    def __init__(self, shape: ModelShape, options: Options, place: Place, size: int, start: float):
        super().__init__(shape, options, place)
        self.start = start
        self.scale = nn.Parameter(torch.empty(size))

    def parameter_rules(self) -> dict[str, Rule]:
        return {"scale": Rule(Constant(self.start), decay=False, fp32=True)}

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (torch.addcmul(state[0], self.scale, update),)

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        return {"gate": Values(self.scale)}


class BareScaledSite(ScaledSite):
    """x <- x + g f(x), which starts at the identity."""

    def __init__(self, shape: ModelShape, options: NormOptions, place: Place):
        super().__init__(shape, options, place, size=1, start=0.0)
        self.norm = norm_or_nothing(shape, options)


class ReZeroSite(Site):
    """x <- x + g attention(LN(x)), then x <- x + g mlp(LN(x)), with one g [1] for both."""

    def __init__(self, shape: ModelShape, options: NormOptions, place: Place):
        super().__init__(shape, options, place)
        self.norm = norm_or_nothing(shape, options)
        self.norm_mlp = norm_or_nothing(shape, options)
        self.scale = nn.Parameter(torch.empty(1))

    def parameter_rules(self) -> dict[str, Rule]:
        return {"scale": Rule(Constant(0.0), decay=False, fp32=True)}

    def forward(self, state: State, side: State, attention: nn.Module, mlp: nn.Module) -> tuple[State, State]:
        (x,) = state
        update, side = attention(self.norm(x), side)
        x = torch.addcmul(x, self.scale, update)
        update, side = mlp(self.norm_mlp(x), side)
        return (torch.addcmul(x, self.scale, update),), side

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        return {"gate": Values(self.scale)}


class _Bare(ResidualVariant):
    """What variants without norms have in common.

    Without norms a sublayer sees the stream's own scale: from GPT-2's embeddings of 0.02 the gradients of q and k begin
    at 1e-9 of the largest, below AdamW's epsilon. With a scale of 0 no depth of updates adds up, so output projections
    start like any other matrix.
    """

    def __init__(self, shape: ModelShape, options: NormOptions):
        super().__init__(shape, options)
        self.close_class = Close if options.norm else BareClose

    @property
    def fidelity(self) -> str:
        return "own" if self.options.norm else "exact"

    def sublayer_rule(self, layer: int, name: str, rule: Rule) -> Rule:
        return output_projections_at(STD, name, rule)

    def _without_norms(self, place: Place, count: int) -> Cost:
        """A site's ``count`` norms less; the last site's result has no norm left that would keep it."""
        if self.options.norm:
            return Cost()
        width, last = self.shape.width, place.index + count == 2 * self.shape.layers
        less = Cost(parameters=-2 * width, flops=-7 * width, saved=-(width + 2)) * count
        return less._replace(written=-width) if last else less

    def closing_cost(self) -> Cost:
        if self.options.norm:
            return Cost()
        width = self.shape.width
        return Cost(parameters=-2 * width, flops=-7 * width, saved=-2)


@RESIDUALS.register("rezero")
class ReZero(_Bare):
    """x <- x + g f(LN(x)), g one number per layer that starts at 0 and that its attention and its MLP share.

    Bachlechner et al. 2020, arXiv 2003.04887, equation 1; the paper has no norm (``norm=false``). At first the model is
    the identity, and every weight of a sublayer waits for its g.
    """

    citation = "Bachlechner et al. 2020, arXiv 2003.04887"
    Options = ReZeroOptions
    kinds = ("both",)
    site_class = ReZeroSite

    def cost(self, place: Place) -> Cost:
        width = self.shape.width
        # Kept are both updates and the stream between them, which is vanilla's second written tensor.
        scaled = Cost(parameters=1, flops=2 * width, saved=3 * width, written=-width)
        return scaled + self._without_norms(place, 2)


@RESIDUALS.register("skip_init")
class SkipInit(_Bare):
    """x <- x + g f(x), g one number per sublayer that starts at 0; no norm anywhere.

    De and Smith 2020, arXiv 2002.10444: SkipInit, there in place of batch norm.
    """

    citation = "De and Smith 2020, arXiv 2002.10444"
    Options = SkipInitOptions
    site_class = BareScaledSite

    def cost(self, place: Place) -> Cost:
        width = self.shape.width
        return Cost(parameters=1, flops=width, saved=width) + self._without_norms(place, 1)


class LayerScaleOptions(Options):
    start: float | None = None
    """Where the scales start; by default 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 for more."""


@RESIDUALS.register("layer_scale")
class LayerScale(ResidualVariant):
    """x <- x + g f(LN(x)), g [C] one number per channel and sublayer.

    LayerScale: Touvron et al. 2021, arXiv 2103.17239, section 2.
    The small start matters early only: AdamW moves each g by about the learning rate a step, whatever its size. Below 1
    it stands in for GPT-2's scaled start of the output projections, which then start like any other matrix.
    """

    citation = "Touvron et al. 2021, arXiv 2103.17239"
    fidelity = "exact"
    Options = LayerScaleOptions

    def __init__(self, shape: ModelShape, options: LayerScaleOptions):
        super().__init__(shape, options)
        by_depth = 0.1 if shape.layers <= 18 else 1e-5 if shape.layers <= 24 else 1e-6
        self.start = by_depth if options.start is None else options.start

    @property
    def equals_vanilla(self) -> str:
        return "exactly" if self.start == 1 else "no"

    def site(self, place: Place) -> Site:
        return ScaledSite(self.shape, self.options, place, size=self.shape.width, start=self.start)

    def sublayer_rule(self, layer: int, name: str, rule: Rule) -> Rule:
        return output_projections_at(STD, name, rule) if self.start < 1 else rule

    def cost(self, place: Place) -> Cost:
        width = self.shape.width
        return Cost(parameters=width, flops=width, saved=width)


@RESIDUALS.register("learned_scale")
class LearnedScale(ResidualVariant):
    """x <- x + g f(LN(x)), g one number per sublayer that starts at 1.

    Used beside other changes in modded-nanogpt, as ``post_lambdas``.
    """

    citation = "Jordan et al. 2024, github.com/KellerJordan/modded-nanogpt"
    fidelity = "own"
    equals_vanilla = "exactly"

    def site(self, place: Place) -> Site:
        return ScaledSite(self.shape, self.options, place, size=1, start=1.0)

    def cost(self, place: Place) -> Cost:
        return Cost(parameters=1, flops=self.shape.width, saved=self.shape.width)


class AdaptiveScaleSite(Site):
    """x <- x + a (1 + b tanh(u . xn)) f(xn), with xn = LN(x), a [1], b [1], u [C]."""

    def __init__(self, shape: ModelShape, options: Options, place: Place):
        super().__init__(shape, options, place)
        self.base = nn.Parameter(torch.empty(1))
        self.strength = nn.Parameter(torch.empty(1))
        self.direction = nn.Parameter(torch.empty(shape.width))

    def parameter_rules(self) -> dict[str, Rule]:
        return {
            "base": Rule(Constant(1.0), decay=False, fp32=True),
            "strength": Rule(Constant(0.0), decay=False, fp32=True),
            "direction": Rule(Normal(STD), decay=True, fp32=True),  # it projects the stream, like a gate's matrix
        }

    def gate(self, normed: torch.Tensor) -> torch.Tensor:
        """a (1 + b tanh(u . xn)) [B, T, 1]."""
        # A product and a sum, which autocast leaves in fp32, where it would round a matrix product to bf16.
        modulation = torch.tanh((normed * self.direction).sum(-1, keepdim=True))
        return self.base * (1 + self.strength * modulation)

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (torch.addcmul(state[0], self.gate(normed), update),)

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        normed, _ = self.enter(state)
        return {"gate": Values(self.gate(normed))}


@RESIDUALS.register("adaptive_scale")
class AdaptiveScale(ResidualVariant):
    """x <- x + a (1 + b m) f(xn), with m = tanh(u . xn) of each token and xn = LN(x).

    A base scale a per sublayer, and how far the input modulates it. a starts at 1 and b at 0, so u [C] moves from the
    second step on.
    """

    citation = "this project"
    fidelity = "own"
    site_class = AdaptiveScaleSite
    equals_vanilla = "exactly"

    def cost(self, place: Place) -> Cost:
        width = self.shape.width
        # Kept are the update and, per token, the modulation, the bracket and the scale.
        return Cost(parameters=width + 2, flops=3 * width + 4, saved=width + 3)
