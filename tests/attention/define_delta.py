"""DeltaNet, gated DeltaNet and Kimi delta attention, written out: their papers' equations token by token."""

import math

import torch
from mixer_models import three
from mixer_row import Row


def silu(x):
    return x / (1 + torch.exp(-x))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def softplus(x):
    return torch.log(1 + torch.exp(x))


def elu_plus_one(x):
    return torch.where(x > 0, x + 1, torch.exp(torch.minimum(x, torch.zeros_like(x))))


MAPS = {"silu": silu, "relu": lambda x: (x + x.abs()) / 2, "elu": elu_plus_one, "identity": lambda x: x}


def l2(x):
    """Of the last axis, with flash-linear-attention's guard against zero vectors."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def l1(x):
    return x / x.abs().sum(-1, keepdim=True).clamp_min(1e-6)


NORMS = {"l2": l2, "sum": l1}


def convolve(x, weight, bias, segment):
    """y_t = b + sum_j w_j x_{t-j} over the tokens of t's document; the weight of j = 0 is stored last."""
    kernel = weight.shape[-1]
    rows = []
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            total = bias
            for j in range(min(kernel, t + 1)):
                if segment is None or segment[row, t - j] == segment[row, t]:
                    total = total + weight[:, 0, kernel - 1 - j] * x[row, t - j]
            rows.append(total)
    return torch.stack(rows).view_as(x)


def projected(p, name, x, activation, segment):
    """act(conv(W x)), without the convolution where the mixer has none."""
    x = x @ p[f"{name}_proj.weight"].T
    if f"{name}_conv1d.weight" in p:
        x = convolve(x, p[f"{name}_conv1d.weight"], p.get(f"{name}_conv1d.bias", 0), segment)
    return activation(x)


def heads_of(x, heads):
    return x.view(*x.shape[:2], heads, -1)


def delta_rule(q, k, v, alpha, beta, segment):
    """S_t = S_{t-1} diag(alpha_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t / sqrt(K), S [V, K].

    Per head, from S = 0 at the first token of every document. alpha [B, T, H, K], beta [B, T, H].
    """
    rows, tokens, heads, width = q.shape
    eye = torch.eye(width, dtype=q.dtype)
    outputs = {}
    for row in range(rows):
        for head in range(heads):
            for t in range(tokens):
                if t == 0 or segment is not None and segment[row, t] != segment[row, t - 1]:
                    state = torch.zeros(v.shape[-1], width, dtype=q.dtype)
                at = row, t, head
                forget = torch.diag(alpha[at]) @ (eye - beta[at] * torch.outer(k[at], k[at]))
                state = state @ forget + beta[at] * torch.outer(v[at], k[at])
                outputs[at] = state @ q[at] / math.sqrt(width)
    places = [(row, t, head) for row in range(rows) for t in range(tokens) for head in range(heads)]
    return torch.stack([outputs[at] for at in places]).view(*q.shape[:3], v.shape[-1])


def normed(o, weight, epsilon):
    return o / torch.sqrt((o * o).mean(-1, keepdim=True) + epsilon) * weight


def delta_net(activation="silu", norm="l2", beta_factor=1, heads=None, epsilon=1e-5):
    """arXiv 2406.06484; the delta rule, ELU + 1 and the sum norm are those of arXiv 2102.11174, section 4.2."""

    def define(p, x, segment, shape):
        count = heads or shape.heads
        x_q, x_k, x_v = three(x)
        q = NORMS[norm](heads_of(projected(p, "q", x_q, MAPS[activation], segment), count))
        k = NORMS[norm](heads_of(projected(p, "k", x_k, MAPS[activation], segment), count))
        v = heads_of(projected(p, "v", x_v, silu, segment), count)
        beta = sigmoid(x_k @ p["b_proj.weight"].T) if "b_proj.weight" in p else torch.ones_like(q[..., 0])
        o = delta_rule(q, k, v, torch.ones_like(k), beta_factor * beta, segment)
        o = normed(o, p["o_norm.weight"], epsilon)
        if "g_proj.weight" in p:
            o = o * silu(heads_of(x_v @ p["g_proj.weight"].T, count))
        return o.flatten(-2) @ p["o_proj.weight"].T

    return define


def gated_delta_net(key_heads=None, gate=silu, beta_factor=1, epsilon=1e-5):
    """arXiv 2412.06464, equation 10, with Mamba-2's decay (arXiv 2405.21060): one number a head.

    Value head i has the query and the key of head i // (value heads / key heads).
    """

    def define(p, x, segment, shape):
        x_q, x_k, x_v = three(x)
        keys, values = key_heads or shape.heads, len(p["A_log"])
        shared = [head // (values // keys) for head in range(values)]
        q = l2(heads_of(projected(p, "q", x_q, silu, segment), keys))[:, :, shared]
        k = l2(heads_of(projected(p, "k", x_k, silu, segment), keys))[:, :, shared]
        v = heads_of(projected(p, "v", x_v, silu, segment), values)
        beta = beta_factor * sigmoid(x_k @ p["b_proj.weight"].T)
        step = softplus(x_k @ p["a_proj.weight"].T + p["dt_bias"])
        alpha = torch.exp(-torch.exp(p["A_log"]) * step)[..., None].expand_as(k)
        o = normed(delta_rule(q, k, v, alpha, beta, segment), p["o_norm.weight"], epsilon)
        if "g_proj.weight" in p:
            o = o * gate(heads_of(x_v @ p["g_proj.weight"].T, values))
        return o.flatten(-2) @ p["o_proj.weight"].T

    return define


def kda(key_heads=None, beta_factor=1, lower_bound=None, epsilon=1e-5):
    """arXiv 2510.26692, equation 1 and section 4: the gated delta rule with a decay for every channel of the keys."""

    def define(p, x, segment, shape):
        x_q, x_k, x_v = three(x)
        keys, values = key_heads or shape.heads, len(p["A_log"])
        shared = [head // (values // keys) for head in range(values)]
        q = l2(heads_of(projected(p, "q", x_q, silu, segment), keys))[:, :, shared]
        k = l2(heads_of(projected(p, "k", x_k, silu, segment), keys))[:, :, shared]
        v = heads_of(projected(p, "v", x_v, silu, segment), values)
        beta = beta_factor * sigmoid(x_k @ p["b_proj.weight"].T)
        logits = heads_of(x_k @ p["f_proj.0.weight"].T @ p["f_proj.1.weight"].T + p["dt_bias"], values)
        rate = torch.exp(p["A_log"])[:, None]
        log_alpha = -rate * softplus(logits) if lower_bound is None else lower_bound * sigmoid(rate * logits)
        o = normed(delta_rule(q, k, v, torch.exp(log_alpha), beta, segment), p["o_norm.weight"], epsilon)
        gate = x_v @ p["g_proj.0.weight"].T @ p["g_proj.1.weight"].T + p["g_proj.1.bias"]
        return (o * sigmoid(heads_of(gate, values))).flatten(-2) @ p["o_proj.weight"].T

    return define


ROWS = [
    Row("delta_net", delta_net(), head_of_family=True),
    Row("delta_net(use_short_conv=false, use_beta=false)", delta_net()),
    Row(
        "delta_net(use_gate=true, expand_k=0.5, expand_v=2, conv_size=2, allow_neg_eigval=true)",
        delta_net(beta_factor=2),
    ),
    Row("delta_net(qk_activation=elu, qk_norm=sum)", delta_net("elu", "sum")),
    Row(
        "delta_net(qk_activation=identity, qk_norm=sum, use_short_conv=false, use_beta=false, allow_neg_eigval=true)",
        delta_net("identity", "sum", beta_factor=2),
    ),
    Row(
        "delta_net(qk_activation=relu, heads=1, conv_bias=true, norm_eps=0.1)",
        delta_net("relu", heads=1, epsilon=0.1),
    ),
    Row("gated_delta_net", gated_delta_net(), head_of_family=True),
    Row(
        "gated_delta_net(heads=2, head_dim=6, num_v_heads=4, use_gate=false, allow_neg_eigval=true)",
        gated_delta_net(key_heads=2, beta_factor=2),
    ),
    Row(
        "gated_delta_net(use_short_conv=false, expand_v=1.5, output_gate_activation=sigmoid, norm_eps=0.1)",
        gated_delta_net(gate=sigmoid, epsilon=0.1),
    ),
    Row("kda", kda(), head_of_family=True),
    Row(
        "kda(heads=2, head_dim=6, num_v_heads=4, expand_v=0.5, use_short_conv=false, allow_neg_eigval=true)",
        kda(key_heads=2, beta_factor=2),
    ),
    Row("kda(lower_bound=-5, norm_eps=0.1)", kda(lower_bound=-5, epsilon=0.1)),
]

FLA = {
    "delta_net": ("DeltaNet", dict(num_heads=2)),
    "delta_net(use_short_conv=false, use_beta=false)": (
        "DeltaNet",
        dict(num_heads=2, use_short_conv=False, use_beta=False),
    ),
    "delta_net(use_gate=true, expand_k=0.5, expand_v=2, conv_size=2, allow_neg_eigval=true)": (
        "DeltaNet",
        dict(num_heads=2, use_gate=True, expand_k=0.5, expand_v=2, conv_size=2, allow_neg_eigval=True),
    ),
    "delta_net(qk_activation=elu, qk_norm=sum)": ("DeltaNet", dict(num_heads=2, qk_activation="elu", qk_norm="sum")),
    "delta_net(qk_activation=identity, qk_norm=sum, use_short_conv=false)": (
        "DeltaNet",
        dict(num_heads=2, qk_activation="identity", qk_norm="sum", use_short_conv=False),
    ),
    "delta_net(qk_activation=relu, heads=1, conv_bias=true)": (
        "DeltaNet",
        dict(num_heads=1, qk_activation="relu", conv_bias=True),
    ),
    "gated_delta_net": ("GatedDeltaNet", dict(num_heads=2, head_dim=16, expand_v=1)),
    "gated_delta_net(heads=2, head_dim=16, num_v_heads=4, use_gate=false, allow_neg_eigval=true)": (
        "GatedDeltaNet",
        dict(num_heads=2, head_dim=16, num_v_heads=4, expand_v=1, use_gate=False, allow_neg_eigval=True),
    ),
    "gated_delta_net(use_short_conv=false, expand_v=2, output_gate_activation=sigmoid)": (
        "GatedDeltaNet",
        dict(num_heads=2, head_dim=16, expand_v=2, use_short_conv=False, output_gate_activation="sigmoid"),
    ),
    "kda": ("KimiDeltaAttention", dict(num_heads=2, head_dim=16)),
    "kda(heads=2, head_dim=16, num_v_heads=4, expand_v=2, use_short_conv=false, allow_neg_eigval=true)": (
        "KimiDeltaAttention",
        dict(num_heads=2, head_dim=16, num_v_heads=4, expand_v=2, use_short_conv=False, allow_neg_eigval=True),
    ),
    "kda(lower_bound=-5)": ("KimiDeltaAttention", dict(num_heads=2, head_dim=16, lower_bound=-5)),
}
"""The layer of flash-linear-attention with the same options, of a model of width 32 with 2 heads."""
