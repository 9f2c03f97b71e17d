"""The elementwise functions that mixers' options name."""

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "identity": lambda x: x,
    "swish": functional.silu,
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "relu": functional.relu,
    "elu": functional.elu,
    "elu_plus_one": lambda x: functional.elu(x) + 1,
}

ActivationName = Literal[*ACTIVATIONS]
"""Type of an option that names one."""


def activation(name: str) -> Activation:
    return ACTIVATIONS[name]
