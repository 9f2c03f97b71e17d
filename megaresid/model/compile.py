"""``torch.compile`` of a model, without a fault of its compiler for CPUs."""

import functools
from collections.abc import Callable

import torch
from torch import nn


def compile_model(model: nn.Module, **options) -> Callable:
    """``torch.compile(model, **options)``, whose gradients are right on a CPU too."""
    _mend_local_buffers()
    return torch.compile(model, **options)


@functools.cache
def _mend_local_buffers() -> None:
    """Keep inductor, in this process, from sharing one row's buffer among rows that it computes at once.

    Where the C++ of two loops is fused over rows, what passes from the first to the second stays in a buffer of one
    row. If the rows are vectorized, 16 of them write to it and the last one wins: a wrong result without an error
    (PyTorch issue 185702; seen in 2.13.0). It needs a sum over rows of a matrix that lies transposed,
    as in the gradient of a normed key of one head. Such loops are left apart here.
    """
    from torch._inductor.codegen.cpp import OuterLoopFusedSchedulerNode  # which takes long to import
    from torch._inductor.virtualized import V

    can_fuse = OuterLoopFusedSchedulerNode.check_outer_fusion_loop_level_attr

    def can_fuse_safely(self, kernels, depth):
        vectorized = any(loop.steps != 1 for kernel in kernels for loop in kernel.loop_nest.loops[:depth])
        return not (vectorized and V.local_buffer_context.local_buffers) and can_fuse(self, kernels, depth)

    OuterLoopFusedSchedulerNode.check_outer_fusion_loop_level_attr = can_fuse_safely
    torch.compiler.config.cache_key_tag += "local-buffers-mended"  # what was compiled before, on disk, may be wrong
