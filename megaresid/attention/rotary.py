"""Rotary position embeddings."""

import torch


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """x [B, T, H, D] of tokens at ``positions`` [T], turned: x' = R_t x, so that q'_t . k'_s depends on t - s alone.

    Su et al. 2021 (arXiv 2104.09864), equation 34 with the pairs (x_i, x_{i + D/2}) of GPT-NeoX instead of neighbours:
    each is turned by the angle t theta^(-2i/D). In fp32 or wider, with autocast off; the result has x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    with torch.autocast(x.device.type, enabled=False):
        frequency = theta ** (torch.arange(half, device=x.device, dtype=wide) / -half)
        angle = positions.to(wide)[:, None, None] * frequency  # [T, 1, D/2]
        cos, sin = angle.cos(), angle.sin()
        first, second = x.to(wide).split(half, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)
