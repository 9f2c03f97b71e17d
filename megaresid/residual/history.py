"""What the variants that keep a history over depth share: a site that adds to it, and the names of what is in it."""

from typing import Any

import torch

from megaresid.residual.stream import Normed, Site, State


class KeepingSite(Site):
    """Pre-LN that leaves its incoming stream in the state, as the last tensor."""

    def write(self, state: State, context: Any, normed: Normed, update: torch.Tensor) -> State:
        return (state[0] + update, *state[1:], state[0])


def block_name(block: int) -> str:
    """The state's name for the output of layer ``block``, counted from 1; 0 is the embedding."""
    return f"block{block}" if block else "x0"
