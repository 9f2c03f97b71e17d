"""ZeRO stage 0: every rank holds every parameter and its optimizer state whole, in the module's own tensors."""

from collections.abc import Mapping

import torch
from torch import nn

from megaresid.training.zero_state.live import LiveState, replicated


def live_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> LiveState:
    """The state under a plain optimizer; there is nothing to publish, the optimizer's tensors are the module's."""
    fragments = [replicated(name, parameter) for name, parameter in parameters.items()]
    return LiveState(fragments, optimizer, publish=lambda: None)
