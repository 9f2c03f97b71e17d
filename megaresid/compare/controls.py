"""Controls: two variants whose place in a comparison is known before it is made. No results are to be expected of them.

    --residual "vanilla,megaresid.compare.controls:VanillaAgain,megaresid.compare.controls:BrokenIdentity"

A comparison that tells the first from vanilla, or does not find the second worse, is not to be believed.
"""

from typing import Any

import torch
from torch import nn

from megaresid.model.init import Constant, Rule
from megaresid.model.presets import ModelShape
from megaresid.residual.cost import Cost
from megaresid.residual.stream import Place, ResidualVariant, Site, State
from megaresid.residual.vanilla import Vanilla
from megaresid.spec import Options


class VanillaAgain(Vanilla):
    """A control: vanilla under another name. At the same seed it trains as vanilla does, bit for bit on a CPU, so that
    a comparison has to find the two indistinguishable."""

    citation = "a control of comparisons: vanilla"
    fidelity = "own"


GATE_START = -4.0
"""Of the gate's logit: 0.018 of the stream is kept at each sublayer."""


class BrokenIdentitySite(Site):
    def __init__(self, shape: ModelShape, options: Options, place: Place):
        super().__init__(shape, options, place)
        self.gate = nn.Parameter(torch.empty(1))

    def parameter_rules(self) -> dict[str, Rule]:
        return {"gate": Rule(Constant(GATE_START), decay=False, fp32=True)}

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        return (update + torch.sigmoid(self.gate) * (state[0] - update),)


class BrokenIdentity(ResidualVariant):
    """A control that is bad on purpose: x <- g x + (1 - g) f(LN(x)), g = sigmoid(a), one a per sublayer.

    The gates start near zero (g = 0.018), so that the stream is replaced at every sublayer instead of added to: no
    identity path is left from the embeddings to the head. A comparison has to find it worse than vanilla.
    """

    citation = "a control of comparisons: a broken identity path"
    fidelity = "own"
    site_class = BrokenIdentitySite

    def cost(self, place: Place) -> Cost:
        width = self.shape.width
        # A difference and a product more than vanilla; the gate's gradient needs the difference.
        return Cost(parameters=1, flops=2 * width, saved=width)
