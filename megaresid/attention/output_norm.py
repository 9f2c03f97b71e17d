"""The norm of a head's output, with or without a gate."""

import torch
from torch import nn
from torch.nn.functional import rms_norm

from megaresid.attention.activations import activation
from megaresid.model.init import Constant, Rule


class OutputNorm(nn.Module):
    """y = w o / sqrt(mean(o^2) + epsilon) * act(gate) over the width of a head, [..., D] -> [..., D].

    RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467, equation 4), in fp32 or wider whatever the dtype of o; without a
    gate the last factor is left out.
    """

    def __init__(self, width: int, epsilon: float = 1e-5, act: str = "swish"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon, self.act = epsilon, activation(act)

    def parameter_rules(self) -> dict[str, Rule]:
        return {"weight": Rule(Constant(1.0), decay=False)}

    def forward(self, o: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        wide = torch.promote_types(o.dtype, torch.float32)
        y = rms_norm(o.to(wide), o.shape[-1:], self.weight.to(wide), self.epsilon)
        return (y if gate is None else y * self.factor(gate.to(wide))).to(o.dtype)

    def factor(self, gate: torch.Tensor) -> torch.Tensor:
        """What multiplies the norm."""
        return self.act(gate)
