"""Mixers that are written out of others and have a name of their own."""

from megaresid.attention.mixer import MIXERS

MIXERS.preset(
    "gla_conv",
    "blend(gla(expand_k=0.5, expand_v=1.0, use_output_gate=true, gate_fn=swish), causal_conv(kernel=4), "
    "gate=per_token_channel)",
    "GLA blended with a depthwise convolution of kernel 4 through a sigmoid gate for every channel, "
    "y = s GLA(x) + (1 - s) conv(x), s = sigmoid(W x + c)",
)
MIXERS.preset(
    "delta_linear",
    "blend(delta_net, linear_attention(feature_map=silu), gate=per_token_head)",
    "DeltaNet plus a global linear attention, mixed by gates for every token and head. The feature map is SiLU, whose "
    "negative values forbid a normaliser",
)
MIXERS.preset(
    "delta_skip",
    "skip(delta_net, gate=per_token_head, output_gate=per_head)",
    "DeltaNet with a sigmoid decay for every head on its output and a gated skip to its input, "
    "y = sigmoid(l) DeltaNet(x) + sigmoid(W x + c) x. The decay scales outputs; one of the state is gated_delta_net's",
)
MIXERS.preset(
    "gla_delta_split",
    "split(gla(use_short_conv=true, gate_fn=swish), delta_net(use_short_conv=true, use_gate=true))",
    "GLA on the first half of the channels and DeltaNet on the second, both with a short convolution on q, k and v and "
    "a SiLU gate on the output, without positions",
)
