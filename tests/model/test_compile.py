"""What inductor makes of a sum over rows of a matrix that lies transposed, where PyTorch's own result is wrong."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from megaresid.model.compile import compile_model


class TransposedKeys(nn.Module):
    """|N^T x|^2, where N has the rows of SiLU(w x) at norm 1: the gradient of N comes as a matrix that lies transposed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 2, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = silu(x * self.weight)
        y = y * y.square().sum(-1, keepdim=True).rsqrt()
        return (y.mT @ x.detach()).square().sum()


def gradients(module: nn.Module, compiled: bool, dtype: torch.dtype) -> list[Tensor]:
    module = module.to(dtype)
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    run = compile_model(module) if compiled else module
    return torch.autograd.grad(run(x), [x, module.weight])


def assert_right() -> None:
    for found, expected in zip(
        gradients(TransposedKeys(), True, torch.float32), gradients(TransposedKeys(), False, torch.float64), strict=True
    ):
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_vectorized_rows_do_not_share_a_buffer():
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        assert_right()


@pytest.mark.full
def test_what_was_compiled_before_is_not_taken_from_the_disk(tmp_path):
    """The same graph, compiled first as PyTorch does it: into the cache that the mended compilation finds."""
    program = """
import torch, test_compile
mended, test_compile.compile_model = test_compile.compile_model, torch.compile
test_compile.gradients(test_compile.TransposedKeys(), True, torch.float32)
torch._dynamo.reset()
test_compile.compile_model = mended
test_compile.assert_right()
"""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=os.path.dirname(__file__), check=True)
