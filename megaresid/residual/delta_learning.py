"""Deep Delta Learning: a sublayer gives the direction along which the stream is rewritten.

Zhang, Liu, Wang and Gu 2026, arXiv 2601.00417, and their public code (github.com/yifanzhang-pro/deep-delta-learning).
The state is a matrix X [n, C] of n value channels, or the ordinary x [C]::

    k = f(xn) / sqrt(|f(xn)|^2 + eps^2)     beta = 2 sigmoid(w . xn + b)     X <- X + beta (v - X k) k^T

with xn = LN(x), v in R^n, and x the sum of X over its channels by learned weights [n, C]. So beta = 0 leaves X as it
is, beta = 1 writes v in place of what X holds along k.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from megaresid.model.init import Constant, Normal, Rule
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading, Values
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
)
from megaresid.spec import Options

CITATION = "Zhang et al. 2026, arXiv 2601.00417"
EPSILON = 1e-5  # of the direction's norm
TARGET_SCALE = 4.0


class DeltaOptions(Options):
    target: Literal["sigmoid", "linear"] = "sigmoid"
    """The value v: 4 sigmoid(W x + b) of the stream, as in the authors' code, or W xn, as in the paper (A.1)."""


def projection_rule(width: int) -> Rule:
    """N(0, 0.5 / sqrt(C)), as the code starts every matrix. It gives a coefficient: fp32."""
    return Rule(Normal(0.5 / math.sqrt(width)), decay=True, fp32=True)


class SigmoidTarget(nn.Module):
    """v = 4 sigmoid(W x + b): [B, T, C] -> [B, T, n]."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.proj = nn.Linear(width, channels)

    def parameter_rules(self) -> dict[str, Rule]:
        return {
            "proj.weight": projection_rule(self.proj.in_features),
            "proj.bias": Rule(Constant(0.0), decay=False, fp32=True),
        }

    def forward(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        return TARGET_SCALE * torch.sigmoid(self.proj(x))

    @staticmethod
    def cost(width: int, channels: int) -> Cost:
        return Cost((width + 1) * channels, flops=2 * width * channels + 2 * channels, saved=channels)


class LinearTarget(nn.Module):
    """v = W xn: [B, T, C] -> [B, T, n]."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.proj = nn.Linear(width, channels, bias=False)

    def parameter_rules(self) -> dict[str, Rule]:
        return {"proj.weight": projection_rule(self.proj.in_features)}

    def forward(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        return self.proj(normed)

    @staticmethod
    def cost(width: int, channels: int) -> Cost:
        return Cost(width * channels, flops=2 * width * channels)


TARGETS = {"sigmoid": SigmoidTarget, "linear": LinearTarget}


class Rewrite(nn.Module):
    """X [B, T, n, C] -> X + beta (v - X k) k^T, for the stream x, its norm and the sublayer's output, all [B, T, C]."""

    def __init__(self, width: int, channels: int, target: str):
        super().__init__()
        self.beta = nn.Linear(width, 1)
        self.target = TARGETS[target](width, channels)

    def parameter_rules(self) -> dict[str, Rule]:
        return {
            "beta.weight": projection_rule(self.beta.in_features),
            "beta.bias": Rule(Constant(0.0), decay=False, fp32=True),
        }

    def forward(self, X: torch.Tensor, x: torch.Tensor, normed: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x, normed, update = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (x, normed, update))
            direction = update.unsqueeze(-2)
            beta, target = self.strength(normed), self.target(x, normed)
            # k is never made: its length enters the coefficients.
            scale = torch.rsqrt(update.square().sum(-1, keepdim=True) + EPSILON**2)
            held = (X * direction).sum(-1) * scale
            return torch.addcmul(X, (beta * (target - held) * scale).unsqueeze(-1), direction)

    def strength(self, normed: torch.Tensor) -> torch.Tensor:
        """beta [B, T, 1]."""
        return 2 * torch.sigmoid(self.beta(normed))

    def diagnose(self, x: torch.Tensor, normed: torch.Tensor) -> dict[str, Reading]:
        with torch.autocast(x.device.type, enabled=False):
            x, normed = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (x, normed))
            return {"beta": Values(self.strength(normed)), "target": Values(self.target(x, normed))}

    @staticmethod
    def cost(width: int, channels: int, target: str) -> Cost:
        """Beside the sum of vanilla. Kept are the update and, for the gradients of one another, the coefficients."""
        own = Cost(
            parameters=width + 1,
            flops=(3 + 4 * channels) * width + 4 + 4 * channels,
            saved=width + 3 + 4 * channels,
        )
        return own + TARGETS[target].cost(width, channels)


class DeltaSite(Site):
    def __init__(self, shape: ModelShape, options: DeltaOptions, place: Place):
        super().__init__(shape, options, place)
        self.rewrite = Rewrite(shape.width, 1, options.target)

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        (x,) = state
        return (self.rewrite(x.unsqueeze(-2), x, normed, update).squeeze(-2),)

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        normed, _ = self.enter(state)
        return self.rewrite.diagnose(state[0], normed)


@RESIDUALS.register("deep_delta")
class DeepDelta(ResidualVariant):
    """x <- x + beta (v - k . x) k with scalars beta and v: section 3.1, the scalar residual state."""

    citation = CITATION
    fidelity = (
        "reconstructed: the target (paper and code differ: an option) and the start of its bias; beta starts around 1, "
        "spread by its random weights, as in the code; LayerNorm for RMSNorm"
    )
    Options = DeltaOptions
    site_class = DeltaSite

    def cost(self, place: Place) -> Cost:
        return Rewrite.cost(self.shape.width, 1, self.options.target)


class ExpandedOptions(DeltaOptions):
    channels: int = Field(default=4, ge=2)
    """Value channels n: the state is n times as wide as the stream."""


class Readout(nn.Module):
    """x = sum_j c_j (.) X_j: X [B, T, n, C] -> [B, T, C], a convolution over all value channels; c starts at 1/n."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))

    def parameter_rules(self) -> dict[str, Rule]:
        return {"weight": Rule(Constant(1 / len(self.weight)), decay=False, fp32=True)}

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return (self.weight * X).sum(-2)

    @staticmethod
    def cost(width: int, channels: int) -> Cost:
        """Kept is the result, by the norm that reads it."""
        return Cost(parameters=channels * width, flops=2 * channels * width, saved=width)


class ExpandedOpening(Opening):
    def __init__(self, shape: ModelShape, options: ExpandedOptions):
        super().__init__(shape, options)
        self.channels = options.channels

    def forward(self, x0: torch.Tensor) -> State:
        return (x0.unsqueeze(-2).repeat(1, 1, self.channels, 1),)


class ExpandedSite(Site):
    def __init__(self, shape: ModelShape, options: ExpandedOptions, place: Place):
        super().__init__(shape, options, place)
        self.readout = Readout(shape.width, options.channels)
        self.rewrite = Rewrite(shape.width, options.channels, options.target)

    def read(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.readout(state[0])
        return x, x

    def write(self, state: State, context: torch.Tensor, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (self.rewrite(state[0], context, normed, update),)

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        normed, x = self.enter(state)
        return self.rewrite.diagnose(x, normed) | {"read": Values(self.readout.weight)}


class ExpandedClose(Close):
    essential = True

    def __init__(self, shape: ModelShape, options: ExpandedOptions, state_length: int):
        super().__init__(shape, options, state_length)
        self.readout = Readout(shape.width, options.channels)

    def close(self, state: State) -> torch.Tensor:
        return self.readout(state[0])

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        return {"read": Values(self.readout.weight)}


@RESIDUALS.register("deep_delta_expanded")
class ExpandedDeepDelta(ResidualVariant):
    """X <- X + beta (v - X k) k^T with X [n, C] and v in R^n: section 3.2, DDL-CC without embedding convolution.

    The embedding convolution and DDL-TC mix positions, which a residual scheme here does not.
    """

    citation = CITATION
    fidelity = (
        "reconstructed: the target (paper and code differ: an option) and the start of its bias; beta starts around 1, "
        "spread by its random weights, as in the code; one readout a sublayer (the code has one a block, with a second "
        "kernel) and its start; LayerNorm for RMSNorm"
    )
    Options = ExpandedOptions
    opening_class = ExpandedOpening
    site_class = ExpandedSite
    close_class = ExpandedClose

    def state_spec(self, index: int) -> StateSpec:
        return (Entry("value_channels", (self.options.channels, self.shape.width)),)

    def opening_cost(self) -> Cost:
        return Cost(written=(self.options.channels - 1) * self.shape.width)

    def cost(self, place: Place) -> Cost:
        width, channels = self.shape.width, self.options.channels
        written = Cost(written=(channels - 1) * width)
        return Readout.cost(width, channels) + Rewrite.cost(width, channels, self.options.target) + written

    def closing_cost(self) -> Cost:
        return Readout.cost(self.shape.width, self.options.channels)
