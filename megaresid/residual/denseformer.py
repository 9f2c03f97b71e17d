"""DenseFormer: after a layer, a learned average over the outputs of the layers so far."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from pydantic import Field
from torch import nn

from megaresid.model.init import Rule, Values
from megaresid.model.presets import ModelShape
from megaresid.readings import Depth, Reading
from megaresid.residual.cost import Cost
from megaresid.residual.history import KeepingSite, block_name, layer_source
from megaresid.residual.stream import RESIDUALS, Entry, Normed, Place, ResidualVariant, Site, State, StateSpec
from megaresid.residual.sums import weighted_sum, weighted_sum_flops
from megaresid.spec import Options


class AverageOptions(Options):
    dilation: int = Field(1, ge=1)
    """Average over every how many-th earlier layer (k of the paper)."""
    period: int = Field(1, ge=1)
    """Average after every how many-th layer (p of the paper)."""


class Schedule(NamedTuple):
    """Which layer outputs are averaged where, and how long each must be kept. Layers are counted from 1 here, as in
    the paper: X_0 is the embedding, X_l what layer l gives, Y_l the average that layer l + 1 reads."""

    layers: int
    dilation: int
    period: int

    def averaged(self, layer: int) -> list[int]:
        """The j of the X_j that Y_layer averages; none where Y_layer is X_layer."""
        if layer == 0 or layer % self.period:
            return []
        return [j for j in range(layer + 1) if (layer - j) % self.dilation == 0]

    def live(self, layer: int) -> list[int]:
        """The j of the X_j that an average after a later layer needs."""
        later = {j for after in range(layer + 1, self.layers + 1) for j in self.averaged(after)}
        return [j for j in range(layer + 1) if j in later]

    def beside(self, layer: int) -> list[int]:
        """The j of the X_j that stand in the state beside Y_layer: the live ones that are not Y_layer itself."""
        return [j for j in self.live(layer) if j != layer or self.averaged(layer)]


def schedule_of(shape: ModelShape, options: AverageOptions) -> Schedule:
    return Schedule(shape.layers, options.dilation, options.period)


class DroppingSite(Site):
    """The MLP of a layer without an average: only what a later average needs stays in the history."""

    def __init__(self, shape: ModelShape, options: AverageOptions, place: Place):
        super().__init__(shape, options, place)
        schedule = schedule_of(shape, options)
        history, layer = schedule.live(place.layer), place.layer + 1
        self.kept = [1 + history.index(j) for j in schedule.beside(layer)]

    def write(self, state: State, context: None, normed: Normed, update: torch.Tensor) -> State:
        return (state[0] + update, *(state[position] for position in self.kept))


class AveragingSite(Site):
    """The MLP of a layer with an average: Y_l = sum_j a_lj X_j."""

    def __init__(self, shape: ModelShape, options: AverageOptions, place: Place):
        super().__init__(shape, options, place)
        schedule = schedule_of(shape, options)
        layer = place.layer + 1
        history = [*schedule.live(place.layer), layer]
        self.averaged = [history.index(j) for j in schedule.averaged(layer)]
        self.kept = [history.index(j) for j in schedule.beside(layer)]
        self.sources = tuple(map(layer_source, schedule.averaged(layer)))
        self.average = nn.Parameter(torch.empty(len(self.averaged)))

    def parameter_rules(self) -> dict[str, Rule]:
        newest = tuple(float(position == len(self.averaged) - 1) for position in range(len(self.averaged)))
        return {"average": Rule(Values(newest), decay=False, fp32=True)}

    def write(self, state: State, context: None, normed: Normed, update: torch.Tensor) -> State:
        history = (*state[1:], state[0] + update)
        average = weighted_sum(self.average.unbind(), [history[position] for position in self.averaged])
        return (average, *(history[position] for position in self.kept))

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        return {"depth": Depth(self.average, self.sources)}


@RESIDUALS.register("dense_former")
class DenseFormer(ResidualVariant):
    """Y_l = sum_j a_lj X_j over j <= l with (l - j) mod k = 0, after every p-th layer l; X_l = layer_l(Y_{l-1}).

    Pagliardini et al. 2024, arXiv 2402.02622, section 3, with dilation k and period p; X_0 is the embedding. a_ll
    starts at 1 and the others at 0: vanilla, bit for bit. With a period beyond the last layer there is no average at
    all. The state is the current stream and those X_j that a later average needs; where the stream is itself the newest
    X_j it stands there once.
    """

    citation = "Pagliardini et al. 2024, arXiv 2402.02622"
    fidelity = "exact"
    Options = AverageOptions
    equals_vanilla = "exactly"

    def __init__(self, shape: ModelShape, options: AverageOptions):
        super().__init__(shape, options)
        self.schedule = schedule_of(shape, options)

    def site(self, place: Place) -> Site:
        if place.kind == "attention":
            # The layer's input, where it is not an average itself and is averaged later, joins the history.
            keeps = place.layer in self.schedule.live(place.layer) and not self.schedule.averaged(place.layer)
            site_class = KeepingSite if keeps else Site
        else:
            site_class = AveragingSite if self.schedule.averaged(place.layer + 1) else DroppingSite
        return site_class(self.shape, self.options, place)

    def state_spec(self, index: int) -> StateSpec:
        layer, inside = divmod(index, 2)
        history = self.schedule.live(layer) if inside else self.schedule.beside(layer)
        return tuple(Entry(name, (self.shape.width,)) for name in ("x", *map(block_name, history)))

    def cost(self, place: Place) -> Cost:
        layer = place.layer + 1
        if place.kind == "attention" or not (averaged := self.schedule.averaged(layer)):
            return Cost()
        return Cost(
            parameters=len(averaged),
            flops=weighted_sum_flops(len(averaged), self.shape.width),
            saved=self.shape.width,  # X_layer; the stream that later sites read is the average
        )
