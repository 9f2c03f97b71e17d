"""Inductor's C++ where rows of a matrix that lies transposed are summed: there PyTorch's own is wrong."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megaresid.model.compile import compile_model

ONE_FILE = {"cpp_wrapper": True, "aot_inductor.debug_compile": True}  # and not optimized, to be compiled sooner


class NormedRows(nn.Module):
    """The gradient of SiLU(x w) / r by x w, for norms r of its rows and a gradient that comes transposed."""

    def forward(self, x: Tensor, w: Tensor, r: Tensor, transposed: Tensor) -> Tensor:
        x = x * w
        s = x.sigmoid()
        y = x * s
        gradient = (transposed.mT - (transposed.mT * y).sum(1, keepdim=True) / r**2 * y) / r
        return gradient * s * (1 + x * (1 - s))


def assert_right(compiler: Callable) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    x, w, transposed = (torch.randn(*size, generator=generator) for size in [(64, 16), (16,), (16, 64)])
    r = (x * w).double().mul((x * w).double().sigmoid()).norm(dim=1, keepdim=True).float()
    found = compiler(NormedRows(), options=ONE_FILE)(x, w, r, transposed)
    expected = NormedRows()(*(tensor.double() for tensor in (x, w, r, transposed)))
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_rows_that_are_computed_at_once_do_not_share_a_buffer():
    """The C++ is written anew; where it is what it was, what g++ made of it is taken from the disk."""
    with torch._inductor.config.patch(fx_graph_cache=False):
        assert_right(compile_model)


@pytest.mark.full
def test_what_was_compiled_before_is_not_taken_from_the_disk(tmp_path):
    """The same graph, compiled first as PyTorch does it: into the cache that the mended compilation finds."""
    program = """
import contextlib, torch, test_compile
with contextlib.suppress(AssertionError):
    test_compile.assert_right(torch.compile)
test_compile.assert_right(test_compile.compile_model)
"""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=os.path.dirname(__file__), check=True)
