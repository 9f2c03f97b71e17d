"""A model filled with saved parameters."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megaresid.model.gpt import GPT, canonical_parameters, set_step
from megaresid.model.plan import ModelPlan
from megaresid.training.checkpoint import check_shapes
from megaresid.users_code import mistakes_told


def check_fit(plan: ModelPlan, shapes: Mapping[str, Sequence[int]], source: str) -> None:
    """Raise UserError where saved parameters, by canonical name, are not those of a plan's model."""
    with mistakes_told(), torch.device("meta"):
        model = GPT(plan)
    live = {name: list(parameter.shape) for name, parameter in canonical_parameters(model, model.prefixes).items()}
    check_shapes(source, {name: list(shape) for name, shape in shapes.items()}, live)


def filled(plan: ModelPlan, step: int, parameters: Iterable[tuple[str, Tensor]]) -> GPT:
    """The model of a plan at a step, fp32 on the CPU, in evaluation mode.

    ``parameters`` are (canonical name, tensor), all of them, one in memory at a time; ``check_fit`` comes first.
    """
    with mistakes_told():
        model = GPT(plan)
    live = canonical_parameters(model, model.prefixes)
    with torch.no_grad():
        for name, tensor in parameters:
            live[name].copy_(tensor)
    set_step(model, step)
    return model.eval()
