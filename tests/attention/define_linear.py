"""Linear attention, retention, lightning attention, gated linear attention, HGRN2 and Mamba-2, written out as sums over
the tokens seen: no state, no chunks."""

import math

import torch
from mixer_models import three
from mixer_row import Row


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def swish(x):
    return x * sigmoid(x)


def relu(x):
    return x * (x > 0)


def elu_plus_one(x):
    return torch.where(x > 0, x + 1, torch.exp(x * (x < 0)))


def identity(x):
    return x


def linear(x, p, name):
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def rms_norm(x, weight):
    """w x / sqrt(mean(x^2) + 1e-5) over the last axis."""
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def heads_of(x, heads):
    """[B, T, H D] -> [B, T, H, D]."""
    return torch.stack(x.chunk(heads, -1), 2)


def seen(t, document):
    """The tokens of t's document up to t, the last one first."""
    for s in range(t, -1, -1):
        if document is not None and document[s] != document[t]:
            return
        yield s


def for_every_head(one, segment, *tensors):
    """[B, T, H, V] from ``one(t, seen, *tensors of a line and a head [T, D])``."""
    lines = []
    for b in range(tensors[0].shape[0]):
        document = None if segment is None else segment[b]
        tokens = [
            torch.stack([
                one(t, list(seen(t, document)), h, *(x[b, :, h] for x in tensors)) for h in range(tensors[0].shape[2])
            ])
            for t in range(tensors[0].shape[1])
        ]
        lines.append(torch.stack(tokens))
    return torch.stack(lines)


def decayed_sum(q, k, v, alpha, segment, scale):
    """o_t = scale sum_{s<=t} (q_t . (alpha_{s+1} * ... * alpha_t * k_s)) v_s; alpha [B, T, H, K or 1] is a factor."""

    def one(t, seen, h, q, k, v, alpha):
        total, kept = 0, torch.ones_like(alpha[t])
        for s in seen:
            total = total + (q[t] * kept * k[s]).sum() * v[s]
            kept = kept * alpha[s]
        return scale * total

    return for_every_head(one, segment, q, k, v, alpha)


def convolve(x, p, name, segment):
    """y_t = b + sum_j w_j x_{t-j}, j < kernel, over the tokens of t's document; w_0 is stored last."""
    weight = p[f"{name}.weight"][:, 0]
    lines = []
    for b in range(x.shape[0]):
        document = None if segment is None else segment[b]
        tokens = []
        for t in range(x.shape[1]):
            total = p.get(f"{name}.bias", torch.zeros_like(x[b, t]))
            for s in seen(t, document):
                if t - s < weight.shape[1]:
                    total = total + weight[:, weight.shape[1] - 1 - (t - s)] * x[b, s]
            tokens.append(total)
        lines.append(torch.stack(tokens))
    return torch.stack(lines)


def projected(p, name, x, segment, act=swish):
    """act(conv(W x)), or W x of a mixer without convolutions."""
    y = linear(x, p, f"{name}_proj")
    return act(convolve(y, p, f"{name}_conv1d", segment)) if f"{name}_conv1d.weight" in p else y


def linear_attention(phi=elu_plus_one, normalize=False, heads=2):
    """arXiv 2006.16236, equation 9; or without its denominator and with an RMS norm of each head."""

    def define(p, x, segment, shape):
        q, k, v = (heads_of(linear(x_i, p, f"{n}_proj"), heads) for n, x_i in zip("qkv", three(x)))

        def one(t, seen, h, q, k, v):
            scores = [(phi(q[t]) * phi(k[s])).sum() for s in seen]
            divisor = sum(scores) + 1e-6 if normalize else math.sqrt(q.shape[-1])
            return sum(score * v[s] for score, s in zip(scores, seen)) / divisor

        o = for_every_head(one, segment, q, k, v)
        o = rms_norm(o, p["norm.weight"]) if "norm.weight" in p else o
        return linear(o.flatten(2), p, "o_proj")

    return define


def gated(p, o, x_v, act):
    """W_o (norm(o) * act(W_g x)), o [B, T, H, V]."""
    (weight,) = (value for name, value in p.items() if name.startswith("g_norm"))
    o = rms_norm(o, weight).flatten(2)
    return linear(o * act(linear(x_v, p, "g_proj")) if "g_proj.weight" in p else o, p, "o_proj")


def retention(phi=identity, act=swish):
    """arXiv 2307.08621, equations 5, 6 and 8: R_t q . R_s k depends on t - s, so that no token has a position here.

    A pair (x_i, x_{i + K/2}) is the complex number x_i + x_{i + K/2} sqrt(-1), turned by t 10000^(-2i/K).
    """

    def define(p, x, segment, shape):
        x_q, x_k, x_v = three(x)
        q, k, v = (heads_of(projected(p, n, x_i, segment), 2) for n, x_i in zip("qkv", (x_q, x_k, x_v)))

        def one(t, seen, h, q, k, v):
            gamma, width = 1 - 2.0 ** (-5 - h), q.shape[-1]
            angle = torch.tensor([10000 ** (-2 * i / width) for i in range(width // 2)], dtype=q.dtype)
            total = 0
            for s in seen:
                pairs = torch.complex(*q[t].chunk(2)) * torch.complex(*k[s].chunk(2)).conj()
                turned = torch.complex((angle * (t - s)).cos(), (angle * (t - s)).sin())
                total = total + gamma ** (t - s) * (pairs * turned).real.sum() * v[s]
            return total / math.sqrt(width)

        return gated(p, for_every_head(one, segment, phi(q), phi(k), v), x_v, act)

    return define


def lightning(p, x, segment, shape):
    """arXiv 2307.14995: lambda = exp(-8 h / H (1 - l / L)) of head h in layer l; the sum of two layers."""
    x_q, x_k, x_v = three(x)
    total = 0
    for layer in range(2):
        own = {n.removeprefix("0."): value for n, value in p.items() if n.startswith("0.") == (layer == 0)}
        q, k, v = (heads_of(projected(own, n, x_i, segment), 4) for n, x_i in zip("qkv", (x_q, x_k, x_v)))
        decay = torch.tensor([math.exp(-8 * h / 4 * (1 - layer / 2)) for h in range(4)], dtype=q.dtype)
        alpha = decay[:, None].expand(*q.shape[:3], 1)
        o = decayed_sum(swish(q), swish(k), v, alpha, segment, q.shape[-1] ** -0.5)
        total = total + gated(own, o, x_v, identity)
    return total


def gla(phi=identity, act=swish, tau=16, least=-math.inf, heads=2):
    """arXiv 2312.06635, equation 3; with a logit for each head instead of each channel, simple GLA."""

    def define(p, x, segment, shape):
        x_q, x_k, x_v = three(x)
        q, k, v = (heads_of(projected(p, n, x_i, segment), heads) for n, x_i in zip("qkv", (x_q, x_k, x_v)))
        by_channel = "gk_proj.1.weight" in p
        logits = linear(linear(x_k, p, "gk_proj.0"), p, "gk_proj.1") if by_channel else linear(x_k, p, "gk_proj")
        alpha = (sigmoid(heads_of(logits, heads)) ** (1 / tau)).clamp(min=math.exp(least))
        return gated(p, decayed_sum(phi(q), phi(k), v, alpha, segment, q.shape[-1] ** -0.5), x_v, act)

    return define


def hgrn2(heads=2, bounds=(0,)):
    """arXiv 2404.07904: f = b + (1 - b) sigmoid(W_f x) is the decay and 1 - f the key; the sum of the layers."""

    def define(p, x, segment, shape):
        x_q, x_k, x_v = three(x)
        total = 0
        for layer, bound in enumerate(bounds):
            earlier = layer < len(bounds) - 1
            own = {n.removeprefix(f"{layer}."): value for n, value in p.items() if n.startswith(f"{layer}.") == earlier}
            q, f, i = (
                heads_of(projected(own, n, x_i, segment, identity), heads) for n, x_i in zip("qfi", (x_q, x_k, x_v))
            )
            f = bound + (1 - bound) * sigmoid(f)
            o = decayed_sum(swish(q), 1 - f, i, f, segment, q.shape[-1] ** -0.5)
            total = total + linear(rms_norm(o.flatten(2), own["g_norm.weight"]), own, "o_proj")
        return total

    return define


def mamba2(heads=2):
    """arXiv 2405.21060, with the letters of the state space: B, C of all heads, u, step and skip of each."""

    def define(p, x, segment, shape):
        x_q, x_k, x_v = three(x)
        C, B, u = (projected(p, n, x_i, segment) for n, x_i in zip("qkv", (x_q, x_k, x_v)))
        step = torch.log(1 + torch.exp(linear(x_k, p, "dt_proj") + p["dt_bias"]))[..., None]  # [B, T, H, 1]
        u, every = heads_of(u, heads), (*step.shape[:3], B.shape[-1])
        alpha = torch.exp(-torch.exp(p["A_log"])[:, None] * step)
        o = decayed_sum(C[:, :, None].expand(every), B[:, :, None].expand(every), step * u, alpha, segment, 1)
        y = (o + p["D"][:, None] * u).flatten(2)
        return linear(rms_norm(y * swish(linear(x_v, p, "g_proj")), p["norm.weight"]), p, "o_proj")

    return define


ROWS = [
    Row("linear_attention", linear_attention(normalize=True)),
    Row("linear_attention(feature_map=relu, expand_k=0.5, expand_v=2, heads=4)",
        linear_attention(relu, normalize=True, heads=4)),
    Row("linear_attention(normalize=true, output_norm=rmsnorm)", linear_attention(normalize=True)),
    Row("linear_attention(normalize=false)", linear_attention()),
    Row("linear_attention(feature_map=silu)", linear_attention(swish)),
    Row("linear_attention(feature_map=identity, output_norm=identity)", linear_attention(identity)),
    Row("retention", retention()),
    Row("retention(expand_k=1, expand_v=2, feature_map=relu, use_short_conv=true, conv_size=3, gate_fn=sigmoid)",
        retention(relu, sigmoid)),
    Row("retention(use_output_gate=false)", retention()),
    Row("lightning(heads=4)", lightning, layers=2),
    Row("simple_gla", gla()),
    Row("simple_gla(expand_k=1, use_short_conv=false, heads=4, feature_map=elu_plus_one, gate_fn=identity)",
        gla(elu_plus_one, identity, heads=4)),
    Row("gla", gla(), head_of_family=True),
    Row("gla(expand_k=1, use_short_conv=true, conv_size=2, feature_map=swish, gate_logit_normalizer=2, clamp_min=-0.3, "
        "gate_low_rank_dim=4)", gla(swish, tau=2, least=-0.3)),
    Row("gla(use_output_gate=false)", gla()),
    Row("hgrn2", hgrn2(bounds=(0, 1 / 2)), layers=2),
    Row("hgrn2(expand_ratio=4, lower_bound=none, use_short_conv=true)", hgrn2(heads=4)),
    Row("mamba2", mamba2()),
    Row("mamba2(expand=2, heads=4, state_size=8, conv_kernel=3)", mamba2(heads=4)),
]

FLA = {
    "linear_attention": (
        "LinearAttention",
        {"num_heads": 2, "feature_map": "elu", "do_feature_map_norm": True, "output_norm": "identity"},
    ),
    "linear_attention(feature_map=relu, normalize=false)": ("LinearAttention", {"num_heads": 2, "feature_map": "relu"}),
    "linear_attention(feature_map=identity)": ("LinearAttention", {"num_heads": 2, "feature_map": "identity"}),
    "retention": ("MultiScaleRetention", {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0}),
    "retention(expand_k=1, expand_v=2, use_short_conv=true, gate_fn=sigmoid)": (
        "MultiScaleRetention", {"num_heads": 2, "use_short_conv": True, "gate_fn": "sigmoid"},
    ),
    "simple_gla": ("SimpleGatedLinearAttention", {"num_heads": 2, "expand_k": 0.5}),
    "gla": ("GatedLinearAttention", {"num_heads": 2}),
    "gla(use_short_conv=true, clamp_min=-0.3, gate_logit_normalizer=4, feature_map=swish)": (
        "GatedLinearAttention",
        {"num_heads": 2, "use_short_conv": True, "clamp_min": -0.3, "gate_logit_normalizer": 4, "feature_map": "swish"},
    ),
    "gla(use_output_gate=false)": ("GatedLinearAttention", {"num_heads": 2, "use_output_gate": False}),
    "hgrn2(expand_ratio=16, lower_bound=none)": ("HGRN2Attention", {"expand_ratio": 16}),
    "hgrn2(expand_ratio=16, lower_bound=none, use_short_conv=true)": (
        "HGRN2Attention", {"expand_ratio": 16, "use_short_conv": True},
    ),
}
