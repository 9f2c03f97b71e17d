"""A mixer's FLOPs, against a count of what it runs over its whole context.

Counted are the matrix products (but for those of attention), a multiply-add for each tap of a short convolution, and by
their definitions attention and the recurrence, whatever form computes them: attention's two products for each pair of
tokens that is seen, and all that the recurrence does token by token, its elementwise work too. Other elementwise work
(norms, activations, gates, rotations) is left out.
"""

import sys

import pytest
import torch
from mixer_models import Mixers, inputs
from mixer_table import ROWS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megaresid.attention import recurrence as recurrences
from megaresid.attention import softmax
from megaresid.attention.short_convolution import ShortConvolution
from megaresid.model.measure import FORMULAS, count_flops

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv")


class Counter(TorchDispatchMode):
    """FLOPs of matrix products, and what others ``add`` in the place of what they run ``apart``."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        result = operator(*arguments, **(keywords or {}))
        name = operator._schema.name
        if name.removeprefix("aten::") in PRODUCTS:
            self.flops += FORMULAS[name](result, *arguments, **(keywords or {}))
        return result

    def recurrence(self, *arguments, **keywords):
        results = []
        with _disable_current_modes():
            self.flops += count_flops(lambda: results.extend(recurrences.by_steps(*arguments, **keywords)))
        return tuple(results)

    def attention(self, q, k, v, window, segment, dropout):
        """Any output of the right shape will do: only the pairs are counted."""
        tokens = q.shape[2]
        pairs = sum(1 for t in range(tokens) for s in range(tokens) if s <= t and (window is None or t - s < window))
        self.flops += q.shape[0] * q.shape[1] * pairs * 2 * (q.shape[3] + v.shape[3])
        return v.clone()

    def convolution(self, module, given, output):
        self.flops += 2 * module.kernel * output.numel()


def counted(row, monkeypatch) -> int:
    mixers, counter, chunked = Mixers(row), Counter(), recurrences.recurrence
    for name, module in list(sys.modules.items()):
        if name.startswith("megaresid.attention") and getattr(module, "recurrence", None) is chunked:
            monkeypatch.setattr(module, "recurrence", counter.recurrence)
    monkeypatch.setattr(softmax, "causal_attention", counter.attention)
    for mixer in mixers.mixers:
        for module in mixer.modules():
            if isinstance(module, ShortConvolution):
                module.register_forward_hook(counter.convolution)
    x = inputs(row, mixers.shape.context, batch=1)
    with torch.no_grad(), counter:  # inference mode would hide the products in a Linear
        mixers(x)
    return counter.flops


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_flops_are_those_that_run(row, monkeypatch):
    plan = Mixers(row).plan
    said = [mixer.flops_per_token(plan.shape, options) for mixer, options in map(plan.mixer_class, range(row.layers))]
    assert all(type(flops) is int for flops in said)
    found = counted(row, monkeypatch) / plan.shape.context
    assert 0 <= found - sum(said) < row.layers, f"{found} counted; each layer drops a fraction of one"
