"""Gates on a sublayer's output, computed from its normed input."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import gelu

from megaresid.model.init import STD, Constant, Normal, Rule
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading, Values
from megaresid.residual.cost import Cost
from megaresid.residual.stream import RESIDUALS, Place, ResidualVariant, Site, State, recomputed
from megaresid.spec import Options

FORMS = {"two_sigmoid": (2.0, 0.0), "sigmoid": (1.0, 3.0)}
"""Of each form of a gate: the factor of the sigmoid, and the bias that it starts from (gates of 1 and 0.953)."""

REDUCTION = 16  # of the hidden layer against the width; squeeze-and-excitation's too


def hidden_width(width: int) -> int:
    return max(width // REDUCTION, 4)


class GateOptions(Options):
    form: Literal["two_sigmoid", "sigmoid"] = "two_sigmoid"
    """2 sigmoid(.), which starts at exactly 1, or sigmoid(.), which starts at sigmoid(3) = 0.953."""


class Gate(nn.Module):
    """factor sigmoid(W2 GELU(W1 xn + b1) + b2): normed [B, T, C] -> gate [B, T, outputs] in fp32 (fp64 for fp64).

    W2 and b2 give the coefficients and stay out of autocast; the product with W1 may run in it.
    """

    def __init__(self, width: int, outputs: int, form: str):
        super().__init__()
        self.factor, self.start = FORMS[form]
        self.fc = nn.Linear(width, hidden_width(width))
        self.proj = nn.Linear(hidden_width(width), outputs)

    def parameter_rules(self) -> dict[str, Rule]:
        return {
            "fc.weight": Rule(Normal(STD), decay=True),
            "proj.weight": Rule(Constant(0.0), decay=True, fp32=True),
            "proj.bias": Rule(Constant(self.start), decay=False, fp32=True),
        }

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        hidden = self.fc(normed)
        with torch.autocast(normed.device.type, enabled=False):
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            return self.factor * torch.sigmoid(self.proj(gelu(hidden)))

    @staticmethod
    def cost(width: int, outputs: int) -> Cost:
        """Of a gate that is not recomputed: kept are both sides of the GELU, the sigmoid and the gate."""
        hidden = hidden_width(width)
        return Cost(
            parameters=(width + 1) * hidden + (hidden + 1) * outputs,
            flops=2 * width * hidden + hidden + 2 * hidden * outputs + 2 * outputs,
            saved=2 * hidden + 2 * outputs,
        )


class TokenGateSite(Site):
    def __init__(self, shape: ModelShape, options: GateOptions, place: Place):
        super().__init__(shape, options, place)
        self.gate = Gate(shape.width, 1, options.form)

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (state[0] + self.gate(normed) * update,)

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        normed, _ = self.enter(state)
        return {"gate": Values(self.gate(normed))}


class _Gated(ResidualVariant):
    """What the gates have in common."""

    Options = GateOptions

    @property
    def equals_vanilla(self) -> str:
        return "exactly" if self.options.form == "two_sigmoid" else "no"


@RESIDUALS.register("token_gate")
class TokenGate(_Gated):
    """x <- x + g(xn) f(xn), xn = LN(x), g = 2 sigmoid(W2 GELU(W1 xn + b1) + b2), one number per token and sublayer.

    W1 [C/16, C], W2 [1, C/16]. First proposed for this project, with a plain sigmoid; compare the transform gate of
    highway networks (Srivastava et al. 2015, arXiv 1505.00387, equation 3), whose carry 1 - g is not taken here.
    """

    citation = "first proposed for this project; cf. Srivastava et al. 2015, arXiv 1505.00387"
    fidelity = "own"
    site_class = TokenGateSite

    def cost(self, place: Place) -> Cost:
        width = self.shape.width
        return Gate.cost(width, 1) + Cost(flops=width, saved=width)  # the product, whose two factors are kept


class SharedTokenGateSite(Site):
    def use(self, shared: Mapping[str, nn.Module]) -> None:
        # In a tuple, where nn.Module does not see it: the gate's parameters have one name, and deepcopy one copy.
        self.gate = (shared["token_gate"],)

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (state[0] + self.gate[0](normed) * update,)

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        normed, _ = self.enter(state)
        return {"gate": Values(self.gate[0](normed))}


@RESIDUALS.register("shared_token_gate")
class SharedTokenGate(TokenGate):
    """``token_gate`` with one gate network for all layers, trained by all of them."""

    site_class = SharedTokenGateSite

    def shared(self) -> dict[str, nn.Module]:
        return {"token_gate": Gate(self.shape.width, 1, self.options.form)}

    def cost(self, place: Place) -> Cost:
        return super().cost(place)._replace(parameters=0)

    def shared_cost(self) -> Cost:
        return Cost(parameters=Gate.cost(self.shape.width, 1).parameters)


class ChannelGateSite(Site):
    def __init__(self, shape: ModelShape, options: GateOptions, place: Place):
        super().__init__(shape, options, place)
        self.gate = Gate(shape.width, shape.width, options.form)

    def _gated(self, normed: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return self.gate(normed) * update

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        # The sigmoid and the gate are as wide as the stream: recomputed, they cost 1 % of the layer and no memory.
        return (state[0] + recomputed(self._gated, normed, update),)

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        """The gate of each channel, its mean over the tokens."""
        normed, _ = self.enter(state)
        return {"gate": Values(self.gate(normed).mean((0, 1)))}


@RESIDUALS.register("channel_gate")
class ChannelGate(_Gated):
    """x <- x + g(xn) (.) f(xn), xn = LN(x), g = 2 sigmoid(W2 GELU(W1 xn + b1) + b2) in R^C.

    The excitation of squeeze-and-excitation (Hu et al. 2018, arXiv 1709.01507, equation 3: W1 [C/16, C],
    W2 [C, C/16]) for each token by itself, without the squeeze, which is a mean over positions; GELU for ReLU, and
    gates that start at 1.
    """

    citation = "own; cf. Hu et al. 2018, arXiv 1709.01507"
    fidelity = "own"
    site_class = ChannelGateSite

    def cost(self, place: Place) -> Cost:
        width = self.shape.width
        return Gate.cost(width, width)._replace(saved=width) + Cost(flops=width)
