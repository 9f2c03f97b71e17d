"""Inputs of the recurrence, and its definition written out."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

DECAYS = ("none", "constant", "head", "channel")
KINDS = [(decay, delta) for decay in DECAYS for delta in (False, True)]
HEAD_AXIS = {"q": 2, "k": 2, "v": 2, "g": 2, "beta": 2, "state": 1, "o": 2, "final": 1}

Inputs = dict[str, Tensor | None]


def inputs(
    decay: str, delta: bool, length: int, batch: int = 1, keys: int = 5, values: int = 3, dtype=torch.float64, seed=0
) -> Inputs:
    """Random inputs for two heads, with keys of norm 1.

    The first head forgets little, 1e-4 to 0.1 a token; the second from 1e-6 to 100, in any order.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gates = {"constant": (2,), "head": (batch, length, 2), "channel": (batch, length, 2, keys)}
    g = None
    if decay != "none":
        spread = torch.rand(gates[decay], generator=generator, dtype=torch.float64)
        weak, any_strength = -(10 ** (-4 + 3 * spread)), -(10 ** (-6 + 8 * spread))
        axis = HEAD_AXIS["g"] if decay != "constant" else 0
        g = torch.cat([weak.narrow(axis, 0, 1), any_strength.narrow(axis, 1, 1)], axis)
    found = {
        "q": normal(batch, length, 2, keys),
        "k": normalize(normal(batch, length, 2, keys), dim=-1),
        "v": normal(batch, length, 2, values),
        "g": g,
        "beta": normal(batch, length, 2).sigmoid() if delta else None,
        "state": normal(batch, 2, keys, values),
    }
    return {name: x if x is None else x.to(dtype).requires_grad_() for name, x in found.items()}


def definition(q, k, v, g=None, beta=None, *, scale=None, state=None, segment=None):
    """o_t = scale S_t^T q_t, with S_t = (I - beta k k^T) diag(alpha) S_{t-1} + beta k v^T under the delta rule, and
    S_t = diag(alpha) S_{t-1} + k v^T without; for one sequence and one head after the other."""
    batch, length, heads, keys = q.shape
    scale = 1 / math.sqrt(keys) if scale is None else scale
    outputs, finals = [], []
    for b in range(batch):
        for h in range(heads):
            zero = q.new_zeros(keys, v.shape[-1])
            S = zero if state is None else state[b, h]
            for t in range(length):
                if segment is not None and t > 0 and segment[b, t] != segment[b, t - 1]:
                    S = zero
                k_t, v_t = k[b, t, h], v[b, t, h]
                if g is not None:
                    alpha = torch.exp(g[h] if g.dim() == 1 else g[b, t, h])
                    S = torch.diag(alpha.expand(keys)) @ S
                if beta is None:
                    S = S + torch.outer(k_t, v_t)
                else:
                    erase = torch.eye(keys, dtype=q.dtype) - beta[b, t, h] * torch.outer(k_t, k_t)
                    S = erase @ S + beta[b, t, h] * torch.outer(k_t, v_t)
                outputs.append(scale * (q[b, t, h] @ S))
            finals.append(S)
    o = torch.stack(outputs).unflatten(0, (batch, heads, length)).transpose(1, 2)
    return o, torch.stack(finals).unflatten(0, (batch, heads))


def results(form: Callable, x: Inputs, **options) -> dict[str, Tensor]:
    """Output, final state where there is one, and the gradients of a random linear function of both, by name."""
    found = form(*(x[name] for name in ("q", "k", "v", "g", "beta")), state=x["state"], **options)
    outputs = dict(zip(("o", "final"), found))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs.values()]
    names = [name for name, tensor in x.items() if tensor is not None and tensor.requires_grad]
    gradients = torch.autograd.grad([*outputs.values()], [x[name] for name in names], weights)
    return outputs | dict(zip(names, gradients, strict=True))


def worst_error(name: str, found: Tensor, expected: Tensor) -> float:
    """Of any head: the largest difference beside the head's largest value."""
    axis = HEAD_AXIS[name] if expected.dim() > 1 else 0
    errors = []
    for h in range(2):
        mine, true = (x.double().select(axis, h) for x in (found, expected))
        assert mine.shape == true.shape and mine.isfinite().all(), name
        errors.append(((mine - true).abs().max() / true.abs().max().clamp_min(1e-30)).item())
    return max(errors)


def assert_equal_results(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert worst_error(name, found[name], expected[name]) < tolerance, name
