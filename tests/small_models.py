"""Small models away from initialisation, of any residual variant and any mixer."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megaresid.model.gpt import GPT, build, canonical_parameters, set_step
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape

SHAPE = ModelShape(layers=4, heads=2, width=32, context=8, vocab_size=40)
IDX = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))


class Case(NamedTuple):
    """What another process needs to train a small model: layer specs, depth, the optimizer step to start from, how
    far its parameters are moved from their start, and a learning rate at which the training is no chaos."""

    residual: str
    attention: str
    layers: int
    step: int
    away: float = 0.1
    rate: float = 0.01


def model_of(
    spec: str,
    shape: ModelShape = SHAPE,
    away: float = 0.2,
    dtype: torch.dtype = torch.float64,
    step: int = 0,
    recompute: bool = False,
    attention: str = "softmax",
) -> GPT:
    """A model with every parameter moved away from its start by N(0, ``away``); 0 leaves it there.

    The noise depends on the parameter's name alone, so what two variants share stays equal.
    """
    model = build(ModelPlan(shape, attention, spec), seed=0, activation_checkpointing=recompute).to(dtype)
    set_step(model, step)
    move_away(canonical_parameters(model, model.prefixes), away, shape.vocab_size)
    return model


@torch.no_grad()
def move_away(parameters: Mapping[str, Tensor], away: float, vocab_size: int) -> None:
    """Add N(0, ``away``) to every parameter, by canonical name; the embedding's padding rows stay zero."""
    for name, parameter in parameters.items():
        generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter += away * noise.to(parameter.dtype)
    parameters["embed.tokens.weight"][vocab_size:] = 0


def loss_of(model: Callable, idx: Tensor = IDX) -> Tensor:
    return model(idx[:, :-1], idx[:, 1:])[1]


def gradients_of(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    """By canonical name; None for a parameter that the loss does not depend on."""
    parameters = canonical_parameters(model, model.prefixes)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)))
