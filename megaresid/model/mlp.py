"""The feed-forward sublayer of GPT-2."""

import torch
from torch import nn
from torch.nn.functional import dropout, gelu

from megaresid.attention.mixer import Side
from megaresid.model.presets import ModelShape


class MLP(nn.Module):
    """C -> 4C -> C with GELU: the tanh form of GPT-2, or the exact one (Hendrycks & Gimpel, arXiv 1606.08415)."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.approximate = "tanh" if shape.activation == "gelu_tanh" else "none"
        self.dropout = shape.dropout
        self.fc = nn.Linear(shape.width, 4 * shape.width)
        self.proj = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: torch.Tensor, side: Side) -> tuple[torch.Tensor, Side]:
        """[B, T, C] -> [B, T, C]; ``side`` is passed on as it is."""
        y = self.proj(gelu(self.fc(x), approximate=self.approximate))
        return dropout(y, self.dropout, self.training), side

    @staticmethod
    def flops_per_token(shape: ModelShape) -> int:
        return 2 * 2 * shape.width * 4 * shape.width
