"""Softmax attention, written out head by head and token by token."""

import math

import torch
from mixer_models import three
from mixer_row import Row


def linear(x, p, name):
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def rms_norm(x, weight):
    """w x / sqrt(mean(x^2) + epsilon) over a head's width."""
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def rotated(x, t, theta):
    """x of token t: the pair (x_i, x_{i + D/2}) turned by the angle t theta^(-2i/D), as complex numbers."""
    half = x.shape[-1] // 2
    angle = torch.tensor([t * theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=x.dtype)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat([turned.real, turned.imag], -1)


def sees(b, t, s, segment, window):
    """Whether token t of line b attends to token s."""
    near = window is None or t - s < window
    return s <= t and near and (segment is None or bool(segment[b, t] == segment[b, s]))


def softmax(heads=None, kv_heads=None, rope=None, qk_norm=False, window=None):
    """arXiv 1706.03762, equation 1; ``define.attention`` takes the values for themselves."""

    def define(p, x, segment, shape):
        x_q, x_k, x_v = three(x)
        return attention(p, x_q, x_k, linear(x_v, p, "v_proj"), segment, shape)

    def attention(p, x_q, x_k, v, segment, shape):
        count = heads or shape.heads
        q, k = linear(x_q, p, "q_proj"), linear(x_k, p, "k_proj")
        size, shared = q.shape[-1] // count, count // (kv_heads or count)
        lines = []
        for b in range(q.shape[0]):
            tokens = []
            for t in range(q.shape[1]):
                outputs = []
                for h in range(count):
                    own = slice(h * size, (h + 1) * size)
                    theirs = slice((h // shared) * size, (h // shared + 1) * size)
                    seen = [s for s in range(t + 1) if sees(b, t, s, segment, window)]
                    query, keys = q[b, t, own], {s: k[b, s, theirs] for s in seen}
                    if qk_norm:
                        query = rms_norm(query, p["q_norm.weight"])
                        keys = {s: rms_norm(key, p["k_norm.weight"]) for s, key in keys.items()}
                    if rope:
                        query, keys = rotated(query, t, rope), {s: rotated(key, s, rope) for s, key in keys.items()}
                    scores = torch.stack([query @ keys[s] for s in seen]) / math.sqrt(size)
                    weights = scores.exp() / scores.exp().sum()
                    outputs.append(sum(w * v[b, s, theirs] for w, s in zip(weights, seen)))
                tokens.append(torch.cat(outputs))
            lines.append(torch.stack(tokens))
        return linear(torch.stack(lines), p, "o_proj")

    define.attention = attention
    return define


def value_residual(first, own, **options):
    """V'_2 = a V_1 + b V_2 in the second of two layers (arXiv 2410.17897); the first layer is plain."""

    def define(p, x, segment, shape):
        attention, (x_q, x_k, x_v) = softmax(**options).attention, three(x)
        p_1 = {name.removeprefix("0."): value for name, value in p.items() if name.startswith("0.")}
        v_1 = linear(x_v, p_1, "v_proj")
        v_2 = p.get("first", first) * v_1 + p.get("own", own) * linear(x_v, p, "v_proj")
        return attention(p_1, x_q, x_k, v_1, segment, shape) + attention(p, x_q, x_k, v_2, segment, shape)

    return define


# A constant added to all scores of a token moves no softmax, so a bias of keys gets no gradient; rotation and the norm
# of keys make it count.
KEYS = ("k_proj.bias",)
ROWS = [
    Row("softmax", softmax(), undriven=KEYS, grows=True, head_of_family=True),
    Row("softmax(heads=4, kv_heads=2, bias=false)", softmax(heads=4, kv_heads=2), grows=True),
    Row("softmax(kv_heads=1)", softmax(kv_heads=1), undriven=KEYS, grows=True),
    Row("softmax(positions=none, window=4)", softmax(window=4), undriven=KEYS),
    Row("softmax(positions=rope)", softmax(rope=10000), grows=True),
    Row(
        "softmax(positions=rope, rope_theta=100, qk_norm=true, kv_heads=1, window=3)",
        softmax(kv_heads=1, rope=100, qk_norm=True, window=3),
    ),
    Row("value_residual", value_residual(0.5, 0.5), layers=2, undriven=KEYS, grows=True),
    Row("value_residual(learned=true, first=0.25)", value_residual(None, None), layers=2, undriven=KEYS, grows=True),
    Row(
        "value_residual(first=2, own=-1, kv_heads=1, positions=rope, window=5)",
        value_residual(2, -1, kv_heads=1, rope=10000, window=5),
        layers=2,
    ),
]
