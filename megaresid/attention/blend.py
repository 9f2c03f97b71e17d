"""Two mixers side by side, blended by a gate."""

from collections.abc import Mapping

import torch

from megaresid import spec
from megaresid.attention.cache import Cache
from megaresid.attention.gates import GATES, GateName, gate_flops_per_token
from megaresid.attention.mixer import MIXERS, Inputs, MixerOption, Side, SideSpec
from megaresid.attention.nested import Nested
from megaresid.attention.projections import three
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading


class Options(spec.Options):
    positional = ("a", "b")

    a: MixerOption
    """The mixer that the gate weighs."""
    b: MixerOption
    """The mixer that has the rest of the weight."""
    gate: GateName = "per_token_channel"
    """What has a weight of its own: a token's channel or head, from the input, or a head, learned."""


@MIXERS.register("blend")
class Blend(Nested):
    """y = s a(x) + (1 - s) b(x), where s = sigmoid(W x + c) for every token and channel, or for every token and head,
    or s = sigmoid(l) for every head, learned.

    A head of the gate is one of the model's heads: C / heads neighbouring channels of the outputs [B, T, C], which
    both mixers have projected already. W and c start as a Linear's, l at 0: the weights start at about a half. With
    three inputs the gate reads that of the values.
    """

    citation = "this project"
    Options = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.gate = GATES[options.gate](shape)

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        a, side = self.run("a", x, side, cache)
        b, side = self.run("b", x, side, cache)
        s = self.gate(three(x)[2])
        return (s * a + (1 - s) * b).to(a.dtype), side

    def diagnose(self, x: Inputs, side: Side) -> Mapping[str, Reading]:
        return {**super().diagnose(x, side), "gate": self.gate.reading(three(x)[2])}

    @classmethod
    def own_flops_per_token(cls, shape: ModelShape, options: Options) -> int:
        return gate_flops_per_token(options.gate, shape)
