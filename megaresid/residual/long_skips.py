"""Earlier tensors of the stream that come in again later: the embedding, the middle of the depth, mirrored layers."""

from collections.abc import Mapping

import torch
from torch import nn

from megaresid.model.init import Constant, Rule
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading, Values
from megaresid.residual.cost import Cost
from megaresid.residual.history import KeepingSite
from megaresid.residual.stream import RESIDUALS, Close, Entry, Place, ResidualVariant, Site, State, StateSpec
from megaresid.spec import Options


class X0BlendOptions(Options):
    residual_first: float = 1.0
    """Where r of the first layer starts; between the first and the last it is linear in depth (nanochat: 1.15)."""
    residual_last: float = 1.0
    """Where r of the last layer starts (nanochat: 1.05)."""
    x0_first: float = 0.0
    """Where z of the first layer starts (nanochat: 0.20)."""
    x0_last: float = 0.0
    """Where z of the last layer starts (nanochat: 0.05)."""


class X0BlendSite(Site):
    """x <- r x + z x0, then pre-LN attention. The first layer's state is x0 alone."""

    X0_LR_MULTIPLIER = 5.0  # modded-nanogpt's; r multiplies through the depth and keeps the body's rate

    def __init__(self, shape: ModelShape, options: X0BlendOptions, place: Place):
        super().__init__(shape, options, place)
        depth = place.layer / max(shape.layers - 1, 1)
        self.residual_start = options.residual_first + (options.residual_last - options.residual_first) * depth
        self.x0_start = options.x0_first + (options.x0_last - options.x0_first) * depth
        self.residual_lambda = nn.Parameter(torch.empty(1))
        self.x0_lambda = nn.Parameter(torch.empty(1))

    def parameter_rules(self) -> dict[str, Rule]:
        z = Rule(Constant(self.x0_start), decay=False, lr_multiplier=self.X0_LR_MULTIPLIER, fp32=True)
        return {"residual_lambda": Rule(Constant(self.residual_start), decay=False, fp32=True), "x0_lambda": z}

    def read(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        blend = torch.addcmul(self.residual_lambda * state[0], self.x0_lambda, state[-1])
        return blend, blend

    def write(self, state: State, context: torch.Tensor, normed: torch.Tensor, update: torch.Tensor) -> State:
        return context + update, state[-1]

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        return {"skip": Values(self.residual_lambda), "x0": Values(self.x0_lambda)}


class LastX0BlendSite(X0BlendSite):
    """The last reader of x0."""

    def write(self, state: State, context: torch.Tensor, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (context + update,)


@RESIDUALS.register("x0_blend")
class X0Blend(ResidualVariant):
    """Before each layer x <- r_l x + z_l x0, with x0 the embedding; then pre-LN sublayers.

    ``resid_lambdas`` and ``x0_lambdas`` of nanochat (``GPT.forward``), first in modded-nanogpt. Both train them with
    betas and, for r, a decay of their own; here r and z do not decay and only the learning rates differ.
    """

    citation = "Karpathy 2025, github.com/karpathy/nanochat; Jordan et al. 2024, github.com/KellerJordan/modded-nanogpt"
    fidelity = "reconstructed: x0 is GPT-2's embedding as it is, which both sources normalise first"
    Options = X0BlendOptions

    @property
    def equals_vanilla(self) -> str:
        return "exactly" if self.options == X0BlendOptions() else "no"

    def site(self, place: Place) -> Site:
        if place.kind == "mlp":
            return Site(self.shape, self.options, place)
        cls = LastX0BlendSite if place.layer == self.shape.layers - 1 else X0BlendSite
        return cls(self.shape, self.options, place)

    def state_spec(self, index: int) -> StateSpec:
        width = (self.shape.width,)
        last_reader = 2 * self.shape.layers - 2
        return (Entry("x", width), Entry("x0", width)) if 0 < index <= last_reader else (Entry("x", width),)

    def cost(self, place: Place) -> Cost:
        if place.kind == "mlp":
            return Cost()
        width = self.shape.width
        return Cost(parameters=2, flops=3 * width, saved=width)


class BackoutOptions(Options):
    start: float = 0.2
    """Where k starts (modded-nanogpt: 0.5)."""


class BackoutClose(Close):
    """x - k x_mid, then the final LN."""

    essential = True

    def __init__(self, shape: ModelShape, options: BackoutOptions, state_length: int):
        super().__init__(shape, options, state_length)
        self.start = options.start
        self.backout_lambda = nn.Parameter(torch.empty(1))

    def parameter_rules(self) -> dict[str, Rule]:
        return {"backout_lambda": Rule(Constant(self.start), decay=False, fp32=True)}

    def close(self, state: State) -> torch.Tensor:
        return torch.addcmul(state[0], self.backout_lambda, state[-1], value=-1)

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        return {"backout": Values(self.backout_lambda)}


@RESIDUALS.register("backout")
class Backout(ResidualVariant):
    """Pre-LN, and at the end LN(x - k x_mid): x_mid is the stream after layer L // 2, counted from 0, and k one number.

    nanochat, ``GPT.forward``. With one or two layers that layer is the last one, and k next to nothing.
    """

    citation = "Karpathy 2025, github.com/karpathy/nanochat; Jordan et al. 2024, github.com/KellerJordan/modded-nanogpt"
    fidelity = "exact"
    Options = BackoutOptions
    close_class = BackoutClose

    def __init__(self, shape: ModelShape, options: BackoutOptions):
        super().__init__(shape, options)
        self.after = shape.layers // 2 + 1  # the layer that x_mid enters

    @property
    def equals_vanilla(self) -> str:
        return "exactly" if self.options.start == 0 else "no"

    def site(self, place: Place) -> Site:
        cls = KeepingSite if place.index == 2 * self.after else Site
        return cls(self.shape, self.options, place)

    def state_spec(self, index: int) -> StateSpec:
        width = (self.shape.width,)
        return (Entry("x", width), Entry("x_mid", width)) if index > 2 * self.after else (Entry("x", width),)

    def cost(self, place: Place) -> Cost:
        if place.index == 2 * self.shape.layers - 1 and self.after < self.shape.layers:
            return Cost(written=-self.shape.width)  # the final norm keeps x - k x_mid in place of x
        return Cost()

    def closing_cost(self) -> Cost:
        width = self.shape.width
        return Cost(parameters=1, flops=2 * width, saved=width)


class UNetOptions(Options):
    start: float = -1.5
    """Where the logits of the skips' weights start: sigmoid(-1.5) = 0.18."""


class JoiningSite(Site):
    """x <- x + sigmoid(s) x_out(j), then pre-LN attention; x_out(j) is the last tensor of the state and leaves it."""

    def __init__(self, shape: ModelShape, options: UNetOptions, place: Place):
        super().__init__(shape, options, place)
        self.start = options.start
        self.skip_logit = nn.Parameter(torch.empty(1))

    def parameter_rules(self) -> dict[str, Rule]:
        return {"skip_logit": Rule(Constant(self.start), decay=False, fp32=True)}

    def read(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        joined = torch.addcmul(state[0], self.weight(), state[-1])
        return joined, joined

    def weight(self) -> torch.Tensor:
        return torch.sigmoid(self.skip_logit)

    def write(self, state: State, context: torch.Tensor, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (context + update, *state[1:-1])

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        return {"skip": Values(self.weight())}


class MiddleSite(JoiningSite):
    """Of the layer that stands opposite the one just before it: what it joins is the stream itself."""

    def read(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        return super().read(state[:1])

    def write(self, state: State, context: torch.Tensor, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (context + update, *state[1:])


@RESIDUALS.register("unet")
class UNet(ResidualVariant):
    """Pre-LN, and before layer L - 1 - j, for j < L // 2, x <- x + sigmoid(s) x_out(j): x_out(j) is the stream after
    layer j, all counted from 0, and s one number for each such layer.

    The skips of modded-nanogpt. The state is a stack that grows up to the middle and shrinks after it.
    """

    citation = "Jordan et al. 2024, github.com/KellerJordan/modded-nanogpt"
    fidelity = (
        "reconstructed: the mirrored layers are those of its first U-net, whose weights are plain and start at 1; the "
        "sigmoid is that of its later ones, which join three layers and are gated by x0 too"
    )
    Options = UNetOptions

    def _keeps(self, layer: int) -> bool:
        """Whether the layer leaves x_out(layer - 1) in the state; layer L - layer will read it."""
        return 0 < 2 * layer < self.shape.layers

    def site(self, place: Place) -> Site:
        return self._site_class(place)(self.shape, self.options, place)

    def _site_class(self, place: Place) -> type[Site]:
        layer, layers = place.layer, self.shape.layers
        if place.kind == "mlp":
            return Site
        if 2 * layer == layers:
            return MiddleSite
        return JoiningSite if self._keeps(layers - layer) else KeepingSite if self._keeps(layer) else Site

    def state_spec(self, index: int) -> StateSpec:
        begun = (index + 1) // 2  # layers whose attention site is done
        kept = [layer for layer in range(begun) if self._keeps(layer) and self.shape.layers - layer >= begun]
        width = (self.shape.width,)
        return (Entry("x", width), *(Entry(f"x_out_{layer - 1}", width) for layer in kept))

    def cost(self, place: Place) -> Cost:
        width = self.shape.width
        if issubclass(self._site_class(place), JoiningSite):
            return Cost(parameters=1, flops=2 * width, saved=width)
        if place.kind == "mlp" and self._keeps(self.shape.layers - place.layer - 1):
            return Cost(written=-width)  # a stream that is only added to is kept by nobody; the sum takes its place
        return Cost()
