"""A mixer with a way around it."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from megaresid import spec
from megaresid.attention.cache import Cache
from megaresid.attention.gates import GATES, GateName, gate_flops_per_token
from megaresid.attention.mixer import MIXERS, Inputs, MixerOption, Side, SideSpec
from megaresid.attention.nested import Nested
from megaresid.attention.projections import three, wide
from megaresid.model.init import Constant, Rule
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading, Values


class Options(spec.Options):
    positional = ("a",)

    a: MixerOption
    """The mixer that is skipped."""
    gate: Literal["scale", GateName] = "scale"
    """What multiplies the input: a learned number for every channel, of any size, or a sigmoid gate."""
    output_gate: GateName | None = None
    """The sigmoid gate that multiplies the mixer's output; none leaves it as it is."""


@MIXERS.register("skip")
class Skip(Nested):
    """y = d a(x) + s x around a mixer a, where s is a learned number for every channel, which starts at 0, or a gate,
    and d is 1 or a gate.

    A gate is sigmoid(W x + c) for every token and channel, or for every token and head, or sigmoid(l) for every head,
    learned; a head is C / heads neighbouring channels. They start at about 1/2. x is the mixer's input, after the norm;
    with three inputs, that of the values.
    """

    citation = "this project"
    Options = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.gate = Scale(shape) if options.gate == "scale" else GATES[options.gate](shape)
        self.output_gate = GATES[options.output_gate](shape) if options.output_gate else None

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        a, side = self.run("a", x, side, cache)
        x = three(x)[2]
        kept = a if self.output_gate is None else self.output_gate(x) * a
        return (kept + self.gate(x) * x).to(a.dtype), side

    def diagnose(self, x: Inputs, side: Side) -> Mapping[str, Reading]:
        x_v = three(x)[2]
        readings = {**super().diagnose(x, side), "skip": self.gate.reading(x_v)}
        if self.output_gate is not None:
            readings["output_gate"] = self.output_gate.reading(x_v)
        return readings

    @classmethod
    def own_flops_per_token(cls, shape: ModelShape, options: Options) -> int:
        gates = [gate for gate in (options.gate, options.output_gate) if gate in GATES]
        return sum(gate_flops_per_token(gate, shape) for gate in gates)


class Scale(nn.Module):
    """A learned number for every channel, whatever the input: [B, T, C] -> [C]."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(shape.width))

    def parameter_rules(self) -> dict[str, Rule]:
        return {"scale": Rule(Constant(0.0), decay=False, fp32=True)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return wide(self.scale)

    def reading(self, x: torch.Tensor) -> Values:
        return Values(self(x))
