"""Gates on what a mixer gives: numbers between 0 and 1 from the input, or learned ones.

They are in fp32 or wider whatever the dtype of x, for 1 - s in bf16 would be 0 or 1/256.
"""

from typing import Literal

import torch
from torch import nn

from megaresid.attention.projections import wide
from megaresid.model.init import Constant, Rule
from megaresid.model.presets import ModelShape
from megaresid.readings import Values

GateName = Literal["per_token_channel", "per_token_head", "per_head"]


class ChannelGate(nn.Linear):
    """sigmoid(W x + b) for every token and channel: [B, T, C] -> [B, T, C]."""

    def __init__(self, shape: ModelShape):
        super().__init__(shape.width, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return wide(super().forward(x)).sigmoid()

    def reading(self, x: torch.Tensor) -> Values:
        """The gate of each channel, its mean over the tokens: [C]."""
        return Values(self(x).mean((0, 1)))


class HeadGate(nn.Linear):
    """sigmoid(W x + b) for every token and head, which all channels of the head share: [B, T, C] -> [B, T, C]."""

    def __init__(self, shape: ModelShape):
        super().__init__(shape.width, shape.heads)
        self.head_width = shape.width // shape.heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return wide(super().forward(x)).sigmoid().repeat_interleave(self.head_width, -1)

    def reading(self, x: torch.Tensor) -> Values:
        """The gate of each token and head: [B, T, H]."""
        return Values(self(x)[..., :: self.head_width])


class LearnedGate(nn.Module):
    """sigmoid(l_h), a learned number for every head, whatever the input: [B, T, C] -> [C]."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.logit = nn.Parameter(torch.empty(shape.heads))
        self.head_width = shape.width // shape.heads

    def parameter_rules(self) -> dict[str, Rule]:
        return {"logit": Rule(Constant(0.0), decay=False, fp32=True)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return wide(self.logit).sigmoid().repeat_interleave(self.head_width)

    def reading(self, x: torch.Tensor) -> Values:
        """The gate of each head: [H]."""
        return Values(self(x)[:: self.head_width])


GATES: dict[GateName, type[nn.Module]] = {
    "per_token_channel": ChannelGate,
    "per_token_head": HeadGate,
    "per_head": LearnedGate,
}


def gate_flops_per_token(name: GateName, shape: ModelShape) -> int:
    """FLOPs per token of its matrix product, if it has one."""
    outputs = {"per_token_channel": shape.width, "per_token_head": shape.heads, "per_head": 0}[name]
    return 2 * shape.width * outputs
