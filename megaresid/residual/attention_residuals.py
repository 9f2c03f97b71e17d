"""Attention Residuals: a softmax over depth says how much each earlier sublayer counts for the next one's input."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from megaresid.model.init import Constant, Rule
from megaresid.model.presets import ModelShape
from megaresid.readings import Depth, Reading, Values
from megaresid.residual.cost import Cost
from megaresid.residual.history import EMBED, sublayer_source
from megaresid.residual.kernels import fused_attnres
from megaresid.residual.stream import (
    RESIDUALS,
    Close,
    Entry,
    Normed,
    Place,
    ResidualVariant,
    Site,
    State,
    StateSpec,
    recomputed,
)
from megaresid.residual.sums import weighted_sum, weighted_sum_flops
from megaresid.spec import Options

KEY_EPSILON = 1e-6
"""Of the keys' RMS norm. The papers give none; this is what the published kernel has as its default."""
NORM_EPSILON = 1e-12


class DepthSoftmax(nn.Module):
    """h = sum_j a_j v_j, a = softmax_j(w . (g * RMSNorm(v_j))), of sources v_j [B, T, C]; w and g are [C].

    The values are not normed. Everything is computed in fp32 without autocast. w starts at 0, so h at the mean.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(width))
        self.key_scale = nn.Parameter(torch.empty(width))

    def parameter_rules(self) -> dict[str, Rule]:
        return {
            "query": Rule(Constant(0.0), decay=False, fp32=True),
            "key_scale": Rule(Constant(1.0), decay=False, fp32=True),
        }

    def weights(self, sources: State) -> torch.Tensor:
        """a [sources, B, T, 1]. The norm is a number per token, so it is multiplied to the score instead of v_j."""
        dtype = torch.promote_types(sources[0].dtype, torch.float32)
        with torch.autocast(sources[0].device.type, enabled=False):
            query = (self.query * self.key_scale).to(dtype)
            scores = torch.stack([source.to(dtype) @ query for source in sources])
            norms = torch.stack([torch.linalg.vector_norm(source, dim=-1, dtype=dtype) for source in sources])
            scores = scores * torch.rsqrt(norms.square() / len(query) + KEY_EPSILON)
            return scores.softmax(0).unsqueeze(-1)

    def forward(self, sources: State) -> torch.Tensor:
        if fused_attnres.fits(sources[0]):
            return fused_attnres.depth_softmax(self.query, self.key_scale, sources, KEY_EPSILON)
        return weighted_sum(self.weights(sources).unbind(), sources)

    def diagnose(self, sources: State, names: tuple[str, ...]) -> dict[str, Reading]:
        return {"depth": Depth(self.weights(sources).squeeze(-1).movedim(0, -1), names)}


class DepthSum(DepthSoftmax):
    """N times the softmax over N sources: their sum at the start, which is what a residual stream holds."""

    def forward(self, sources: State) -> torch.Tensor:
        return len(sources) * super().forward(sources)


class AddedDepthSoftmax(DepthSoftmax):
    """sum_j v_j + gamma sum_j a_j v_j: the residual stream is the sum of the sources, so it needs no tensor beside."""

    def __init__(self, width: int):
        super().__init__(width)
        self.gamma = nn.Parameter(torch.empty(1))

    def parameter_rules(self) -> dict[str, Rule]:
        return super().parameter_rules() | {"gamma": Rule(Constant(0.0), decay=False, fp32=True)}

    def forward(self, sources: State) -> torch.Tensor:
        weights = self.weights(sources)
        return weighted_sum((1 + self.gamma.to(weights.dtype) * weights).unbind(), sources)

    def diagnose(self, sources: State, names: tuple[str, ...]) -> dict[str, Reading]:
        return super().diagnose(sources, names) | {"gate": Values(self.gamma)}


def depth_softmax_flops(sources: int, width: int) -> int:
    """FLOPs per token of ``DepthSoftmax``: a product and a norm a source, the softmax and the sum."""
    return 4 * sources * width + 10 * sources + weighted_sum_flops(sources, width)


class RoutingOptions(Options):
    scale: Literal["mean", "sum"] = "mean"
    """What equal scores make of the sources: their mean, as in the paper, or their sum, which is exactly vanilla."""
    norm_epsilon: float | None = Field(None, gt=0)
    """Epsilon of the LayerNorms, whose inputs the mean shrinks; none: 1e-12 with the mean, the model's with the sum."""

    @property
    def sublayers(self) -> int:
        """Of which a source is the sum of the outputs."""
        return 1


class BlockOptions(RoutingOptions):
    block_size: int = Field(6, ge=1)
    """Sublayers in a block, of whose outputs only the sum is kept."""

    @property
    def sublayers(self) -> int:
        return self.block_size


DEPTHS = {"mean": DepthSoftmax, "sum": DepthSum}


def source_names(shape: ModelShape, index: int, block_size: int) -> tuple[str, ...]:
    """What diagnostics call the sources before sublayer ``index``: a block by its first and last sublayer, also the
    last block, which has come as far as ``index`` alone."""
    blocks = [(first, min(first + block_size, 2 * shape.layers) - 1) for first in range(0, index, block_size)]
    return (EMBED, *("-".join(dict.fromkeys(map(sublayer_source, ends))) for ends in blocks))


def norm_epsilon(shape: ModelShape, options: RoutingOptions) -> float:
    return options.norm_epsilon or {"mean": NORM_EPSILON, "sum": shape.norm_epsilon}[options.scale]


class FirstSite(Site):
    """The first sublayer: its only source is the embedding, and a softmax over one source would have dead parameters.
    What the sublayer gives is the next source, in the precision of the stream: sums of it must not be rounded."""

    def write(self, state: State, context: None, normed: Normed, update: torch.Tensor) -> State:
        return (*state, update.to(state[0].dtype))


class RoutedSite(FirstSite):
    """Reads all sources. What is read is computed again in the backward pass: the site keeps references alone."""

    def __init__(
        self, shape: ModelShape, options: Options, place: Place, depth: type[DepthSoftmax], block_size: int
    ):
        super().__init__(shape, options, place)
        self.depth = depth(shape.width)
        self.sources = source_names(shape, place.index, block_size)

    def enter(self, state: State) -> tuple[torch.Tensor, None]:
        return recomputed(self._input, *state), None

    def _input(self, *sources: torch.Tensor) -> torch.Tensor:
        return self.norm(self.depth(sources))

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        return self.depth.diagnose(state, self.sources)


class InnerSite(RoutedSite):
    """Within a block: what the sublayer gives is added to the newest source."""

    def write(self, state: State, context: None, normed: Normed, update: torch.Tensor) -> State:
        return (*state[:-1], state[-1] + update)


class RoutedClose(Close):
    """One more softmax over all sources, then the final norm."""

    essential = True

    def __init__(self, shape: ModelShape, options: RoutingOptions, state_length: int):
        super().__init__(shape, options, state_length)
        self.norm.eps = norm_epsilon(shape, options)
        self.depth = DEPTHS[options.scale](shape.width)
        self.sources = source_names(shape, 2 * shape.layers, options.sublayers)

    def forward(self, tensors: State) -> torch.Tensor:
        return recomputed(self._hidden, *tensors[: self.state_length])

    def _hidden(self, *sources: torch.Tensor) -> torch.Tensor:
        return self.norm(self.depth(sources))

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        return self.depth.diagnose(state, self.sources)


class SumClose(Close):
    """The stream is the sum of the sources."""

    def close(self, state: State) -> torch.Tensor:
        return sum(state[1:], start=state[0])


class DepthHistory(ResidualVariant):
    """What the variants of this file share: the state is the embedding and the sums of the sublayers' outputs over
    blocks of ``block_size``, the last block as far as it has come."""

    block_size = 1

    def state_spec(self, index: int) -> StateSpec:
        spans = [(first, min(first + self.block_size, index) - 1) for first in range(0, index, self.block_size)]
        names = ["x0", *(f"y{first}" if first == last else f"y{first}-{last}" for first, last in spans)]
        return tuple(Entry(name, (self.shape.width,)) for name in names)

    def _routing_cost(self, index: int) -> Cost:
        """Of the softmax before sublayer ``index``: the norm's input is not kept, nor its mean and deviation."""
        width, sources = self.shape.width, len(self.state_spec(index))
        return Cost(parameters=2 * width, flops=depth_softmax_flops(sources, width), saved=-2)

    def _source_cost(self, index: int) -> Cost:
        """Of a site whose sublayer's output becomes a source: vanilla adds it to the stream."""
        return Cost(flops=0 if index % self.block_size else -self.shape.width)


@RESIDUALS.register("attention_residuals")
class AttentionResiduals(DepthHistory):
    """h_i = sum_j a_ij v_j replaces the stream: v_0 is the embedding, v_{i+1} what sublayer i gives, and
    a_i. = softmax_j(w_i . (g_i * RMSNorm(v_j))).

    Kimi Team 2026, arXiv 2603.15031, section 3, full form. Before every sublayer but the first, and once more before
    the final norm. At w = 0 the input is vanilla's divided by the number of sources, up to 2 layers + 1: the LayerNorm
    after it removes the factor, but is as if its epsilon were multiplied by the square. With GPT-2's embeddings 1e-5
    would then drown the signal, hence the default of 1e-12.
    """

    citation = "Kimi Team 2026, arXiv 2603.15031"
    fidelity = "reconstructed: the epsilon of the keys' norm is not given"
    Options = RoutingOptions
    close_class = RoutedClose

    def __init__(self, shape: ModelShape, options: RoutingOptions):
        super().__init__(shape, options)
        self.block_size = options.sublayers
        self.site_shape = shape.model_copy(update={"norm_epsilon": norm_epsilon(shape, options)})

    @property
    def equals_vanilla(self) -> str:
        same = self.options.scale == "sum" and self.site_shape.norm_epsilon == self.shape.norm_epsilon
        return "exactly" if same else "up to epsilon"

    def site(self, place: Place) -> Site:
        if place.index == 0:
            return FirstSite(self.site_shape, self.options, place)
        site_class = InnerSite if place.index % self.block_size else RoutedSite
        return site_class(self.site_shape, self.options, place, DEPTHS[self.options.scale], self.block_size)

    def cost(self, place: Place) -> Cost:
        routing = self._scaled_routing_cost(place.index) if place.index else Cost()
        return routing + self._source_cost(place.index)

    def closing_cost(self) -> Cost:
        return self._scaled_routing_cost(2 * self.shape.layers)

    def _scaled_routing_cost(self, index: int) -> Cost:
        return self._routing_cost(index) + Cost(flops=self.shape.width if self.options.scale == "sum" else 0)


@RESIDUALS.register("block_attention_residuals")
class BlockAttentionResiduals(AttentionResiduals):
    """Attention Residuals over sums b_n of blocks of sublayers: sources are b_0, the embedding, the finished blocks,
    and within a block what it has come to.

    Kimi Team 2026, arXiv 2603.15031, section 3, block form. With blocks of one sublayer it is the full form.
    """

    Options = BlockOptions


@RESIDUALS.register("delta_attention_residuals")
class DeltaAttentionResiduals(DepthHistory):
    """h_i = x_i + gamma_i sum_j a_ij v_j beside the ordinary stream x_i = sum_j v_j; v_0 the embedding, v_{j+1} = y_j.

    Luo et al. 2026, arXiv 2605.18855: additive routing over what each sublayer added. The first sublayer and the close
    read the stream alone, as in the released code.
    """

    citation = "Luo et al. 2026, arXiv 2605.18855"
    fidelity = (
        "reconstructed: gamma, learned from 0, is an option of the released code, which else has 1; that the embedding "
        "is a source is the code's; the epsilon of the keys' norm is not given"
    )
    equals_vanilla = "exactly"
    close_class = SumClose

    def site(self, place: Place) -> Site:
        if place.index == 0:
            return FirstSite(self.shape, self.options, place)
        return RoutedSite(self.shape, self.options, place, AddedDepthSoftmax, self.block_size)

    def cost(self, place: Place) -> Cost:
        routing = Cost(parameters=1, flops=2 * len(self.state_spec(place.index))) + self._routing_cost(place.index)
        last = place.index == 2 * self.shape.layers - 1  # its output is summed by the close, which keeps nothing of it
        written = Cost(written=-self.shape.width if last else 0)
        return (routing if place.index else Cost()) + self._source_cost(place.index) + written

    def closing_cost(self) -> Cost:
        """The sum, which the final norm keeps."""
        return Cost(flops=2 * self.shape.layers * self.shape.width, saved=self.shape.width)
