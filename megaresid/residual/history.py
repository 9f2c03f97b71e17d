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


EMBED = "embed"
"""What diagnostics call the embedding, as a source of a later input."""


def layer_source(block: int) -> str:
    """What diagnostics call the stream after layer ``block``, counted as in ``block_name``: its number from 0."""
    return f"{block - 1:02d}" if block else EMBED


def sublayer_source(index: int) -> str:
    """What diagnostics call the output of sublayer ``index``, or the stream after it: ``"03.mlp"``."""
    return f"{index // 2:02d}.{('attention', 'mlp')[index % 2]}"
