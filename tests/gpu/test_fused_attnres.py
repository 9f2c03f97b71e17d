"""flash-linear-attention's kernel for the softmax over depth, against the plain form."""

import importlib.util

import pytest
import torch

from megaresid.residual.attention_residuals import DepthSoftmax
from megaresid.residual.kernels import fused_attnres
from megaresid.residual.sums import weighted_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention"),
]


@pytest.mark.parametrize("count", [2, 7, 49])
def test_the_kernel_equals_the_plain_form_in_fp32(count):
    """Outputs, and the gradients of the sources, the query and the keys' scales."""
    generator = torch.Generator("cuda").manual_seed(count)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = scale * torch.randn(shape, generator=generator, device="cuda")
        return values.requires_grad_()

    sources = tuple(random(2, 16, 256, scale=0.1 * 2 ** (j % 5)) for j in range(count))
    module = DepthSoftmax(256).cuda()
    with torch.no_grad():
        module.query.copy_(random(256, scale=0.1))
        module.key_scale.copy_(1 + random(256, scale=0.1))
    assert fused_attnres.fits(sources[0])
    plain = weighted_sum(module.weights(sources).unbind(), sources)
    fused = module(sources)
    direction = random(2, 16, 256).detach()
    given = (*sources, module.query, module.key_scale)
    expected = torch.autograd.grad(plain, given, direction)
    found = torch.autograd.grad(fused, given, direction)
    for one, other in zip((fused, *found), (plain, *expected)):
        assert (one - other).norm() < 1e-5 * other.norm()
