"""Convolutions, blends, splits and skips, written out around the definitions of the mixers inside."""

import torch
from define_delta import delta_net
from define_linear import gla, linear_attention, swish
from define_softmax import softmax
from mixer_models import three
from mixer_row import Row


def below(p, name):
    """The parameters of the mixer ``name``, by the rest of their names."""
    return {key.removeprefix(f"{name}."): value for key, value in p.items() if key.startswith(f"{name}.")}


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def conv(act=lambda x: x):
    """y_t = act(w_0 x_t + w_1 x_{t-1} + ...), as far back as the kernel and the document reach; w_0 is stored last."""

    def define(p, x, segment, shape):
        _, _, x = three(x)
        w = p["conv1d.weight"][:, 0].flip(-1)
        y = torch.zeros_like(x)
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                for j in range(min(w.shape[-1], t + 1)):
                    if segment is None or segment[b, t - j] == segment[b, t]:
                        y[b, t] = y[b, t] + w[:, j] * x[b, t - j]
        return act(y)

    return define


def gate(p, name, x, heads):
    """[B, T, C]: from the input for every channel or for every head, or learned for every head."""
    if f"{name}.logit" in p:
        given = p[f"{name}.logit"].expand(*x.shape[:2], -1)
    else:
        given = x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    width = x.shape[-1]
    if given.shape[-1] == width:
        return sigmoid(given)
    return sigmoid(torch.stack([given[..., channel // (width // heads)] for channel in range(width)], -1))


def blend(a, b):
    def define(p, x, segment, shape):
        s = gate(p, "gate", three(x)[2], shape.heads)
        return s * a(below(p, "a"), x, segment, shape) + (1 - s) * b(below(p, "b"), x, segment, shape)

    return define


def skip(a, output_gate=False):
    def define(p, x, segment, shape):
        y, x_v = a(below(p, "a"), x, segment, shape), three(x)[2]
        if output_gate:
            y = gate(p, "output_gate", x_v, shape.heads) * y
        factor = p["gate.scale"] if "gate.scale" in p else gate(p, "gate", x_v, shape.heads)
        return y + factor * x_v

    return define


def split(a, b, heads_of_a):
    def define(p, x, segment, shape):
        cut = heads_of_a * (shape.width // shape.heads)
        first = shape.model_copy(update={"width": cut, "heads": heads_of_a})
        rest = shape.model_copy(update={"width": shape.width - cut, "heads": shape.heads - heads_of_a})
        y_1 = a(below(p, "a"), tuple(way[..., :cut] for way in three(x)), segment, first)
        y_2 = b(below(p, "b"), tuple(way[..., cut:] for way in three(x)), segment, rest)
        return torch.cat([y_1, y_2], -1)

    return define


# A convolution reads the input of the values alone.
NOT_READ = ("x_q", "x_k")
# Softmax attention's, see define_softmax.
KEYS = ("a.k_proj.bias",)
ROWS = [
    Row("causal_conv", conv(), undriven=NOT_READ),
    Row("causal_conv(kernel=3, act=swish)", conv(lambda x: x * sigmoid(x)), undriven=NOT_READ),
    Row("blend(softmax, causal_conv(kernel=2))", blend(softmax(), conv()), undriven=KEYS, grows=True),
    Row("blend(causal_conv, gla, gate=per_head)", blend(conv(), gla())),
    Row("blend(gla, causal_conv, gate=per_token_head)", blend(gla(heads=3), conv()), width=24, heads=3),
    Row("skip(gla)", skip(gla())),
    Row("skip(gla, gate=per_token_channel)", skip(gla())),
    Row("skip(gla, gate=per_head, output_gate=per_token_channel)", skip(gla(), True)),
    Row("split(gla, causal_conv, share=0.7)", split(gla(heads=2), conv(), 2), width=24, heads=3),
    Row(
        "split(skip(causal_conv(kernel=1)), blend(causal_conv(kernel=2), gla))",
        split(skip(conv()), blend(conv(), gla(heads=1)), 1),
    ),
    Row("gla_conv", blend(gla(), conv()), head_of_family=True),
    Row("delta_linear", blend(delta_net(), linear_attention(swish))),
    Row("delta_skip", skip(delta_net(), True)),
    Row("gla_delta_split", split(gla(heads=1), delta_net(), 1)),
]
