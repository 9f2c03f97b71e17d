"""ResFormer's value residual: every layer's values are mixed with those of the first."""

from collections.abc import Mapping

import torch
from torch import nn

from megaresid.attention import softmax
from megaresid.attention.cache import Cache
from megaresid.attention.mixer import MIXERS, SEGMENT, Inputs, Mixer, Side, SideSpec
from megaresid.attention.projections import three
from megaresid.attention.softmax import Softmax, head_counts
from megaresid.errors import UserError
from megaresid.model.init import Constant, Rule
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading, Values

VALUES = "values"


class Options(softmax.Options):
    first: float = 0.5
    """Weight of the first layer's values."""
    own: float = 0.5
    """Weight of the layer's own values; first=0 and own=1 is exactly softmax."""
    learned: bool = False
    """Whether the two weights are parameters of each layer, which start there."""


class FirstValues(Softmax):
    """Softmax attention that hands its values on."""

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        x_q, x_k, x_v = three(x)
        values = self.v_proj(x_v)
        y = self.attend(self.q_proj(x_q), self.k_proj(x_k), values, self.segment(side), cache)
        return y, (*side, values.unflatten(-1, (self.kv_heads, -1)))


@MIXERS.register("value_residual")
class ValueResidual(Softmax):
    """Softmax attention with V'_l = a V_1 + b V_l: Zhou et al. 2024, arXiv 2410.17897, section 3 (ResFormer).

    V_1, [B, T, heads, D] of keys and values, are the values of the first layer that has this mixer, which is
    plain softmax attention itself; they travel in the side channel. a and b are constants (1/2 each in the paper's
    identity form) or learned in each layer. A cache keeps the mixed values. The FLOPs are softmax attention's: the mix
    is elementwise.
    """

    citation = "Zhou et al. 2024, arXiv 2410.17897"
    fidelity = "exact"
    reads = (SEGMENT, VALUES)
    Options = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec):
        super().__init__(shape, options, layer, entering)
        self.position = [name for name, _ in entering].index(VALUES)
        self.weights = {"first": options.first, "own": options.own}
        self.learned = options.learned
        for name, weight in self.weights.items():
            if options.learned:
                setattr(self, name, nn.Parameter(torch.empty(1)))
            else:
                self.register_buffer(name, torch.tensor([weight]), persistent=False)

    @classmethod
    def make(cls, shape: ModelShape, options: Options, layer: int, entering: SideSpec) -> Mixer:
        first = VALUES not in (name for name, _ in entering)
        return (FirstValues if first else cls)(shape, options, layer, entering)

    @classmethod
    def side_spec(cls, shape: ModelShape, options: Options, entering: SideSpec) -> SideSpec:
        heads, kv_heads = head_counts(shape, options)
        first, own = dict(entering).get(VALUES), (kv_heads, shape.width // heads)
        if first is None:
            return (*entering, (VALUES, own))
        if first != own:
            raise UserError(
                f"attention 'value_residual': the first layer has {first[0]} heads of values, {first[1]} wide, and a "
                f"later one {own[0]}, {own[1]} wide: give all of them the same heads and kv_heads"
            )
        return entering

    def parameter_rules(self) -> dict[str, Rule]:
        weights = self.weights if self.learned else {}
        return {name: Rule(Constant(weight), decay=False, fp32=True) for name, weight in weights.items()}

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        x_q, x_k, x_v = three(x)
        own = self.v_proj(x_v)
        values = (self.first * side[self.position].flatten(-2) + self.own * own).to(own.dtype)
        return self.attend(self.q_proj(x_q), self.k_proj(x_k), values, self.segment(side), cache), side

    def diagnose(self, x: Inputs, side: Side) -> Mapping[str, Reading]:
        if not self.learned:
            return {}
        return {"first_values": Values(self.first), "own_values": Values(self.own)}
