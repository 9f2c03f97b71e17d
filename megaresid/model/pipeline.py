"""The model as DeepSpeed's ``PipelineModule``: the same list of layer specs, filled with the same values."""

import contextlib
import io
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from deepspeed.pipe import LayerSpec, PipelineModule

from megaresid.errors import UserError
from megaresid.model.flops import forward_flops_per_token
from megaresid.model.gpt import GPT, TOKENS, Head, canonical_parameters, canonical_rules, layer_specs
from megaresid.model.init import fill
from megaresid.model.mlp import MLP
from megaresid.model.plan import ModelPlan, component_name

BEFORE_LAYERS, BEHIND_LAYERS = 2, 2  # parts: the embedding and the opening; the close and the tied head


def check_pipeline(plan: ModelPlan, stages: int) -> None:
    """Raise UserError for a plan that ``stages`` stages cannot train: too few layers, or a module that all layers
    share, of which each stage would train a copy of its own."""
    if stages > plan.shape.layers:
        raise UserError(
            f"--pipeline-stages {stages}: the model has {plan.shape.layers} layers, and a stage needs one at least"
        )
    for variant in plan.variants():
        if shared := variant.shared():
            raise UserError(
                f"residual {component_name(variant)!r} shares {', '.join(map(repr, shared))} over all layers, and the "
                "stages of a pipeline share no module: train it without pipeline parallelism, or choose another variant"
            )


def stage_bounds(plan: ModelPlan, stages: int) -> list[int]:
    """Where the list of parts is cut: stage s has parts [bounds[s], bounds[s + 1]), one layer at least.

    The cut is that whose dearest stage has the fewest forward FLOPs, the output head counted.
    """
    layers = plan.shape.layers
    costs = [_layer_flops(plan, layer) for layer in range(layers)]
    costs[-1] += forward_flops_per_token(plan)["head"]

    @cache
    def best(first: int, left: int) -> tuple[int, tuple[int, ...]]:
        """Of the layers from ``first`` on in so many stages: the dearest stage's cost, and where stages begin."""
        if left == 1:
            return sum(costs[first:]), (first,)
        cuts = range(first + 1, layers - left + 2)
        ways = ((max(sum(costs[first:cut]), best(cut, left - 1)[0]), cut) for cut in cuts)
        cost, cut = min(ways)
        return cost, (first, *best(cut, left - 1)[1])

    begins = best(0, stages)[1]
    return [0, *(BEFORE_LAYERS + layer for layer in begins[1:]), layers + BEFORE_LAYERS + BEHIND_LAYERS]


def _layer_flops(plan: ModelPlan, layer: int) -> int:
    mixer, options = plan.mixer_class(layer)
    variant = plan.residual_of(layer)
    sites = sum(variant.cost(place).flops for place in variant.places(layer))
    return mixer.flops_per_token(plan.shape, options) + MLP.flops_per_token(plan.shape) + sites


def describe_stages(plan: ModelPlan, stages: int) -> list[str]:
    """One line a stage: what it has."""
    lines = []
    for stage, layers in enumerate(stage_layers(plan, stages)):
        held = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        before = "embedding, " if stage == 0 else ""
        behind = ", head with its copy of the embedding" if stage == stages - 1 else ""
        lines.append(f"stage {stage} of {stages}: {before}{held}{behind}")
    return lines


def stage_parameters(plan: ModelPlan, stages: int) -> list[int]:
    """The parameters that each stage has, padding rows and the last one's copy of the embedding included."""
    with torch.device("meta"):
        parts = GPT(plan).parts
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    counts.append(counts[0] if stages > 1 else 0)
    return [sum(counts[begin:end]) for begin, end in pairwise(stage_bounds(plan, stages))]


def stage_layers(plan: ModelPlan, stages: int) -> list[range]:
    """The layers of each stage."""
    cuts = [0, *(bound - BEFORE_LAYERS for bound in stage_bounds(plan, stages)[1:-1]), plan.shape.layers]
    return [range(first, end) for first, end in pairwise(cuts)]


class Stages(PipelineModule):
    """A ``PipelineModule`` that is cut where ``bounds`` say, and says nothing while it is built."""

    def __init__(self, specs: list[LayerSpec], bounds: Sequence[int]):
        self._bounds = list(bounds)
        # They broadcast the tied parameter as it is, and autograd would remember that and warn.
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            super().__init__(specs, num_stages=len(bounds) - 1)

    def _partition_layers(self, method: str) -> None:
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


def pipeline_module(
    plan: ModelPlan,
    stages: int,
    seed: int,
    activation_checkpointing: bool = False,
    bounds: Sequence[int] | None = None,
) -> tuple[PipelineModule, list[str]]:
    """The plan cut into ``stages``, each rank with its own part, and the parts' canonical prefixes.

    The loss function is the tied head's, ``loss(hidden, targets)``; ``bounds`` cut elsewhere than ``stage_bounds``. All
    ranks call it; ``torch.distributed`` is initialized. Raises what ``check_pipeline`` does.
    """
    check_pipeline(plan, stages)
    parts = layer_specs(plan, activation_checkpointing)
    prefixes = [part.prefix for part in parts]
    module = Stages([part.spec for part in parts], bounds or stage_bounds(plan, stages))
    if TOKENS in module.tied_modules:  # the first and the last stage; the last asks for the loss
        module.loss_fn = Head(module.tied_modules[TOKENS]).loss
    fill(canonical_parameters(module, prefixes), canonical_rules(module, prefixes, plan), seed)
    return module, prefixes
