"""What a computation really does: its FLOPs by the convention of ``residual/cost.py``, and what it keeps for backward.

torch's own FLOP counter sees 0 for attention on a CPU, triangular solves and everything elementwise. This one knows an
operator or says that it does not, so nothing is silently 0.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Formula = Callable[..., int]
"""From an operator's result and its arguments to FLOPs."""


def _per_element(count: int) -> Formula:
    return lambda result, *arguments, **_: count * _first(result).numel()


def _per_element_read(count: int) -> Formula:
    return lambda result, x, *arguments, **_: count * x.numel()


def _free(result: Any, *arguments: Any, **_: Any) -> int:
    return 0


def _add(result: Tensor, x: Tensor, other: Any, alpha: float = 1, **_: Any) -> int:
    return (1 if alpha == 1 else 2) * result.numel()


def _product(result: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return 2 * result.numel() * a.shape[-1]


def _sum_and_product(result: Tensor, start: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    """The sum that a product is added to is where its multiply-adds begin."""
    return _product(result, a, b)


def _attention(result: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, is_causal: bool = False, **_) -> int:
    """Two products and a softmax over the pairs of tokens that are seen: [..., T, D] each."""
    queries, keys = q.shape[-2], k.shape[-2]
    pairs = sum(min(i + 1, keys) for i in range(queries)) if is_causal else queries * keys
    return math.prod(q.shape[:-2]) * pairs * (2 * q.shape[-1] + 2 * v.shape[-1] + 5)


def _triangular_solve(result: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return result.numel() * a.shape[-1]


def _linear_cross_entropy(result: Any, hidden: Tensor, weight: Tensor, *arguments: Any, **_: Any) -> int:
    """The loss alone: its gradients, which the operator takes at once, belong to the backward pass."""
    return hidden.shape[0] * weight.shape[0] * (2 * weight.shape[1] + 5)


def _decayed_scores(result: list[Tensor], queries: list[Tensor], k: Tensor, g: Tensor) -> int:
    """Of every pair of a chunk's C tokens a product, on log2 C levels the factors of half of all tokens as queries and
    of half as keys, and two sums."""
    chunk, count = k.shape[-2], len(queries)
    levels = chunk.bit_length() - 1
    return k.numel() * (2 * count * (chunk + 1) + levels * (count + 5)) // 2


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


def _table(names: str, formula: Formula) -> dict[str, Formula]:
    return {f"aten::{name}": formula for name in names.split()}


FORMULAS: dict[str, Formula] = {
    **_table("mm bmm mv dot", _product),
    **_table("addmm baddbmm addmv", _sum_and_product),
    **_table("_scaled_dot_product_flash_attention_for_cpu", _attention),
    **_table("linalg_solve_triangular", _triangular_solve),
    **_table("add sub", _add),
    **_table("mul div neg abs sign reciprocal rsub pow square sqrt rsqrt exp expm1 log log1p sin cos", _per_element(1)),
    **_table("sigmoid tanh relu silu gelu softplus log_sigmoid_forward", _per_element(1)),
    **_table("maximum minimum clamp clamp_min clamp_max where masked_fill", _per_element(1)),
    **_table("eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_not", _per_element(1)),
    **_table("addcmul addcdiv", _per_element(2)),
    **_table("lerp", _per_element(3)),
    **_table("_softmax _log_softmax", _per_element(5)),
    **_table("native_layer_norm", _per_element(7)),
    **_table("sum mean amax amin max min prod cumsum any all", _per_element_read(1)),
    **_table("linalg_vector_norm", _per_element_read(2)),
    **_table("var std var_mean", _per_element_read(3)),
    **_table("logsumexp", _per_element_read(4)),
    **_table("empty empty_like empty_strided new_empty zeros zeros_like new_zeros ones ones_like new_ones", _free),
    **_table("full full_like new_full scalar_tensor arange eye lift_fresh fill zero", _free),
    **_table("clone copy _to_copy cat stack repeat constant_pad_nd _unsafe_view", _free),
    **_table("promote_types result_type", _free),  # they give no tensor
    **_table("embedding index index_select gather scatter tril triu roll flip", _free),
    "megaresid::linear_cross_entropy": _linear_cross_entropy,
    "megaresid::decayed_scores": _decayed_scores,
}
"""By the operator's name, without the underscore of its in-place form. Who defines an operator adds its own."""


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        keywords = keywords or {}
        result = operator(*arguments, **keywords)
        if not _is_view(operator):
            namespace, name = operator._schema.name.split("::")
            name = f"{namespace}::{name.removesuffix('_')}"
            if name not in FORMULAS:
                raise NotImplementedError(f"operator {name} has no formula: add one to FORMULAS in {__name__}")
            self.flops += FORMULAS[name](result, *arguments, **keywords)
        return result


def _is_view(operator: torch._ops.OpOverload) -> bool:
    """Whether its results only look at its arguments' memory."""
    aliases = [value.alias_info for value in operator._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of ``call()``, from the operators that it runs. What activation checkpointing runs again in a backward
    pass is not part of it. Raises NotImplementedError that names an operator without a formula."""
    with _Counter() as counter:
        call()
    return counter.flops


def saved_bytes(call: Callable[[], Any], excluded: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of ``call()`` for the backward pass.

    Storages are counted once, whole; those of ``excluded`` (parameters, inputs) and of integers are not. Works on fake
    tensors too.
    """
    left_out = {tensor.untyped_storage()._cdata for tensor in excluded}
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no storage is freed and its address used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage._cdata not in left_out:
            kept.setdefault(storage._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    sizes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return sizes
