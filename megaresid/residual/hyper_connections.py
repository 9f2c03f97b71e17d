"""Hyper-connections: n streams instead of one, and learned coefficients to read, mix and write them.

Zhu et al. 2024, arXiv 2409.19606. Also what its relatives share: the site, the opening and the close of a wide stream.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from megaresid import readings
from megaresid.model.init import STD, Constant, Rule, Values, output_projections_at
from megaresid.model.presets import ModelShape
from megaresid.residual.cost import Cost
from megaresid.residual.stream import (
    RESIDUALS,
    Close,
    Entry,
    Opening,
    Place,
    ResidualVariant,
    Site,
    State,
    StateSpec,
    recomputed,
)
from megaresid.residual.sums import weighted_sum, weighted_sum_flops
from megaresid.spec import Options

CLOSES = {"sum": torch.sum, "mean": torch.mean}
SCALE = 0.01  # at which what depends on the token starts: the paper's s_alpha and s_beta


class WideOptions(Options):
    streams: int = Field(default=4, ge=2, le=8)
    """Number n of streams, each as wide as the model."""
    close: Literal["mean", "sum"] = "mean"
    """How the streams become one before the final norm."""

    @property
    def parts(self) -> int:
        return self.streams

    @property
    def inputs(self) -> int:
        return 1


def mixed(weights: torch.Tensor, streams: torch.Tensor) -> torch.Tensor:
    """sum_j weights[..., j, k] streams[..., j, :] for every k: [..., n, m] and [..., n, W] -> [..., m, W].

    A loop over the streams, of which a compiler makes one kernel; a product of matrices as small as these, one for
    each token, would be slow on its own and stand between kernels that can be one.
    """
    return weighted_sum(weights.unsqueeze(-1).unbind(-3), streams.unsqueeze(-2).unbind(-3))


class WideSite(Site):
    """h = sum_j R[j] H[j];  H'[k] = sum_j M[j, k] H[j] + D[k] f(LN(h)), with coefficients that may depend on the token.

    The state is cut into ``parts`` streams of equal width. There are ``inputs`` of them that the sublayer reads and
    gives, side by side: R is [n, inputs]. For the backward pass a site keeps the streams, M, D, what its sublayer
    reads and what it gives; all else is computed again.
    """

    def __init__(self, shape: ModelShape, options: Options, place: Place):
        super().__init__(shape, options, place)
        self.parts, self.inputs = options.parts, options.inputs

    def coefficients(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """R [..., n, inputs], M [..., n, n] (from stream j to stream k) and D [..., n] for streams [..., n, W].

        Called with autocast off: streams are fp32 under autocast, and so are their coefficients.
        """
        raise NotImplementedError

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).unflatten(-1, (self.parts, -1))

    def enter(self, state: State) -> tuple[torch.Tensor, Any]:
        normed, *context = recomputed(self._enter, state[0])
        return normed, context

    def _enter(self, x: torch.Tensor) -> State:
        streams = self.cut(x)
        with torch.autocast(x.device.type, enabled=False):
            reading, mixing, writing = self.coefficients(streams)
        return self.norm(mixed(reading, streams).flatten(-2)), mixing, writing

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        mixing, writing = context
        streams = mixed(mixing, self.cut(state[0]))
        update = update.unflatten(-1, (self.inputs, -1))
        return (torch.addcmul(streams, writing.unsqueeze(-1), update).view_as(state[0]),)

    def diagnose(self, state: State) -> Mapping[str, readings.Reading]:
        with torch.autocast(state[0].device.type, enabled=False):
            reading, mixing, writing = self.coefficients(self.cut(state[0]))
        return {
            "read": readings.Values(reading),
            "mixing": readings.Mixing(mixing.mT),
            "write": readings.Values(writing),
        }


def connection_cost(parts: int, inputs: int, part_width: int) -> Cost:
    """Of a WideSite with given coefficients beside vanilla's sum: kept are what the sublayer reads and gives."""
    return Cost(
        flops=(inputs + parts) * weighted_sum_flops(parts, part_width) + (2 * parts - inputs) * part_width,
        saved=inputs * part_width - 2,
        written=(parts - inputs) * part_width,
    )


class WideOpening(Opening):
    """n copies of x0: H [B, T, n, C]."""

    def __init__(self, shape: ModelShape, options: WideOptions):
        super().__init__(shape, options)
        self.streams = options.streams

    def forward(self, x0: torch.Tensor) -> State:
        return (x0.unsqueeze(-2).repeat(1, 1, self.streams, 1),)


class WideClose(Close):
    def __init__(self, shape: ModelShape, options: WideOptions, state_length: int):
        super().__init__(shape, options, state_length)
        self.reduce = CLOSES[options.close]

    def close(self, state: State) -> torch.Tensor:
        return self.reduce(state[0], dim=-2)


class WideVariant(ResidualVariant):
    """A state H [n, C] of n streams."""

    opening_class = WideOpening
    close_class = WideClose

    def state_spec(self, index: int) -> StateSpec:
        return (Entry("streams", (self.options.streams, self.shape.width)),)

    def cost(self, place: Place) -> Cost:
        cost = connection_cost(self.options.streams, 1, self.shape.width)
        if place.index == 2 * self.shape.layers - 1:  # a sum or a mean keeps none of what it reads
            cost = cost._replace(written=-self.shape.width)
        return cost

    def opening_cost(self) -> Cost:
        return Cost(written=(self.options.streams - 1) * self.shape.width)

    def closing_cost(self) -> Cost:
        return Cost(flops=self.options.streams * self.shape.width, saved=self.shape.width)  # the final norm's input


class ConnectionOptions(Options):
    dynamic: bool = True
    """Whether coefficients depend on the token, beside a part that does not."""
    tanh: bool = True
    """Whether the part that depends on the token is bounded by a tanh."""


class ConnectionSite(WideSite):
    """Parameters A_m [n, inputs], A_r [n, n] and B [n]: equation 1, and their start: equation 14."""

    def __init__(self, shape: ModelShape, options: ConnectionOptions, place: Place):
        super().__init__(shape, options, place)
        # One input starts as stream i mod n at site i; n inputs start as the n streams.
        self.first = place.index % (self.parts // self.inputs)
        self.A_m = nn.Parameter(torch.empty(self.parts, self.inputs))
        self.A_r = nn.Parameter(torch.empty(self.parts, self.parts))
        self.B = nn.Parameter(torch.empty(self.parts))

    def parameter_rules(self) -> dict[str, Rule]:
        return {
            "A_m": Rule(Values(one_hot_columns(self.parts, self.inputs, self.first)), decay=False, fp32=True),
            "A_r": Rule(Values(one_hot_columns(self.parts, self.parts)), decay=False, fp32=True),
            "B": Rule(Constant(1.0), decay=False, fp32=True),
        }


def one_hot_columns(rows: int, columns: int, first: int = 0) -> tuple[float, ...]:
    """A matrix, row by row, whose column k has its 1 in row k + first."""
    return tuple(float(row == column + first) for row in range(rows) for column in range(columns))


class StaticSite(ConnectionSite):
    """The coefficients are the parameters: equations 3 to 5."""

    def coefficients(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.A_m, self.A_r, self.B

    def enter(self, state: State) -> tuple[torch.Tensor, Any]:
        return recomputed(self._normed, state[0]), (self.A_r, self.B)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(mixed(self.A_m, self.cut(x)).flatten(-2))


class DynamicSite(ConnectionSite):
    """Z = LN(H) per stream; A_m + s_a tanh(Z W_m), A_r + s_a tanh(Z W_r), B + s_b tanh(Z W_b): equations 10 to 13.

    W [W, inputs + n + 1] is [W_m | W_r | W_b].
    """

    def __init__(self, shape: ModelShape, options: ConnectionOptions, place: Place):
        super().__init__(shape, options, place)
        part_width = shape.width // self.inputs
        self.columns = [self.inputs, self.parts, 1]
        self.bound = nn.Tanh() if options.tanh else nn.Identity()
        self.stream_norm = nn.LayerNorm(part_width, eps=shape.norm_epsilon)
        self.W = nn.Parameter(torch.empty(part_width, sum(self.columns)))
        self.s_a = nn.Parameter(torch.empty(1))
        self.s_b = nn.Parameter(torch.empty(1))

    def parameter_rules(self) -> dict[str, Rule]:
        return super().parameter_rules() | {
            "W": Rule(Constant(0.0), decay=True, fp32=True),
            "s_a": Rule(Constant(SCALE), decay=False, fp32=True),
            "s_b": Rule(Constant(SCALE), decay=False, fp32=True),
        }

    def coefficients(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        by_token = self.bound(self.stream_norm(streams) @ self.W)
        reading, mixing, writing = by_token.split(self.columns, dim=-1)
        return (
            torch.addcmul(self.A_m, self.s_a, reading),
            torch.addcmul(self.A_r, self.s_a, mixing),
            torch.addcmul(self.B, self.s_b, writing.squeeze(-1)),
        )


def site_cost(options: ConnectionOptions, part_width: int) -> Cost:
    """What the coefficients of a ConnectionSite cost."""
    parts, inputs = options.parts, options.inputs
    static = Cost(parameters=parts * (inputs + parts + 1))
    if not options.dynamic:
        return static
    columns = inputs + parts + 1
    return static + Cost(
        parameters=(columns + 2) * part_width + 2,
        flops=parts * (7 * part_width + 2 * part_width * columns + (2 + options.tanh) * columns),
        saved=parts * (parts + 1),
    )


class HyperOptions(ConnectionOptions, WideOptions):
    streams: int = Field(default=4, ge=1, le=8)
    """Number n of streams, each as wide as the model."""
    close: Literal["sum", "mean"] = "sum"
    """How the streams become one before the final norm: their sum, as in the paper, or their mean."""
    out_scale: bool = False
    """Divide the start of the output projections by sqrt(n), as the paper's sentence is read here."""


@RESIDUALS.register("hyper_connections")
class HyperConnections(WideVariant):
    """h = sum_j A_m[j] H[j];  H'[k] = sum_j A_r[j, k] H[j] + B[k] f(LN(h)): equations 2 to 5, algorithm 1.

    H [n, C] begins as n copies of the embeddings. A_m starts one-hot at stream i mod n for sublayer i, A_r as the
    identity and B as ones, so each stream begins as vanilla's. ``dynamic`` adds what depends on the token.
    """

    citation = "Zhu et al. 2024, arXiv 2409.19606"
    fidelity = (
        "reconstructed: the sqrt(n) by which output projections are scaled at the start is read as a divisor, and is "
        "an option, off (out_scale)"
    )
    Options = HyperOptions

    def __init__(self, shape: ModelShape, options: HyperOptions):
        super().__init__(shape, options)
        self.site_class = DynamicSite if options.dynamic else StaticSite

    @property
    def equals_vanilla(self) -> str:
        if self.options.streams == 1:
            return "exactly"
        if self.options.out_scale:
            return "no"
        return "exactly" if self.options.close == "mean" else "up to epsilon"

    def sublayer_rule(self, layer: int, name: str, rule: Rule) -> Rule:
        if not self.options.out_scale:
            return rule
        return output_projections_at(STD / math.sqrt(2 * self.shape.layers * self.options.streams), name, rule)

    def cost(self, place: Place) -> Cost:
        return super().cost(place) + site_cost(self.options, self.shape.width)
