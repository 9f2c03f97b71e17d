"""What norms, rotations, convolutions and blends compute in fp32 and give back in bf16."""

import pytest
import torch
from mixer_models import Mixers, inputs
from mixer_row import Row
from torch import Tensor

from megaresid.attention.delta_mixer import l2_norm, sum_norm
from megaresid.attention.output_norm import OutputNorm
from megaresid.attention.rotary import rotate
from megaresid.attention.short_convolution import ShortConvolution

ROUNDING = 2**-8
"""Of a number to bf16, relative to it, at most."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def filled(module: torch.nn.Module) -> torch.nn.Module:
    for index, parameter in enumerate(module.parameters()):
        torch.nn.init._no_grad_normal_(parameter, 1.0, 0.3, generator=torch.Generator().manual_seed(index))
    return module


def l2(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def l1(x):
    return x / x.abs().sum(-1, keepdim=True).clamp_min(1e-6)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


NORM = filled(OutputNorm(64)).bfloat16()
WEIGHT = NORM.weight.detach().double()
GATE = drawn(2, 50, 2, 64, seed=1)
COMPUTED = {
    "l2_norm": (l2_norm, l2),
    "sum_norm": (sum_norm, l1),
    "OutputNorm": (NORM, lambda x: rms(x, WEIGHT)),
    "gated OutputNorm": (
        lambda x: NORM(x, GATE),
        lambda x: rms(x, WEIGHT) * GATE.double() / (1 + (-GATE.double()).exp()),
    ),
}


@pytest.mark.parametrize(("function", "exact"), COMPUTED.values(), ids=COMPUTED)
def test_norms_of_bf16_are_rounded_once(function, exact):
    x = drawn(2, 50, 2, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = function(x), exact(x.double())
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= ROUNDING * expected.abs() + 1e-6).all()


def test_a_rotation_of_bf16_is_rounded_once():
    x, positions = drawn(2, 50, 2, 64), torch.arange(1000, 1050)
    with torch.autocast("cpu", torch.bfloat16):
        found = rotate(x, positions)
    expected = rotate(x.double(), positions)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= ROUNDING * expected.abs() + 1e-3).all()  # fp32 angles of a thousand


def test_a_short_convolution_of_bf16_with_weights_in_fp32_is_rounded_once():
    module, x = filled(ShortConvolution(16, 4, "identity", bias=True)), drawn(2, 50, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = module(x)
        expected = module.double()(x.double())
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= ROUNDING * expected.abs() + 1e-5).all()


@pytest.mark.parametrize(
    "spec",
    [
        "softmax(qk_norm=true, positions=rope)",
        "causal_conv",
        "blend(softmax, gla)",
        "blend(softmax, gla, gate=per_head)",
        "skip(softmax)",
        "skip(gla, gate=per_token_head, output_gate=per_head)",
        "delta_net",
        "gated_delta_net",
        "kda",
    ],
)
def test_in_goes_bf16_and_out_comes_bf16_under_autocast(spec):
    """Also where gates, weights and norms are in fp32."""
    row = Row(spec, None)
    mixers, x = Mixers(row, dtype=torch.float32), inputs(row).bfloat16()
    exact = mixers(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y = mixers(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()
