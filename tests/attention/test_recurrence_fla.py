"""The recurrence equals flash-linear-attention's naive functions in fp32: outputs, final states and gradients."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from recurrence_cases import assert_equal_results, inputs, results

from megaresid.attention.recurrence import recurrence

pytestmark = pytest.mark.full
LENGTH = 128  # some of theirs take whole chunks of 64 only


class Reference(NamedTuple):
    """A function of ``fla.ops``, and the names of its arguments in its own order."""

    path: str
    decay: str
    delta: bool
    arguments: str
    state: bool = False
    heads_first: bool = False

    def __str__(self) -> str:
        return self.path.split(":")[1]


REFERENCES = [
    Reference("linear_attn:naive_recurrent_linear_attn", "none", False, "q k v", state=True),
    Reference("linear_attn:naive_chunk_linear_attn", "none", False, "q k v"),
    Reference("retention:naive_retention", "constant", False, "q k v", heads_first=True),
    Reference("simple_gla:naive_recurrent_simple_gla", "head", False, "q k v g", state=True),
    Reference("simple_gla:naive_chunk_simple_gla", "head", False, "q k v g", state=True),
    Reference("simple_gla:naive_parallel_simple_gla", "head", False, "q k v g"),
    Reference("gla:naive_recurrent_gla", "channel", False, "q k v g", state=True),
    Reference("delta_rule:delta_rule_recurrence", "none", True, "q k v beta", state=True, heads_first=True),
    Reference("delta_rule:delta_rule_chunkwise", "none", True, "q k v beta", heads_first=True),
    Reference("delta_rule:delta_rule_parallel", "none", True, "q k v beta", heads_first=True),
    Reference("gated_delta_rule:naive_recurrent_gated_delta_rule", "head", True, "q k v beta g", state=True),
    Reference("gated_delta_rule:naive_chunk_gated_delta_rule", "head", True, "q k v g beta", state=True),
    Reference("kda:naive_recurrent_kda", "channel", True, "q k v g beta", state=True),
    Reference("kda:naive_chunk_kda", "channel", True, "q k v g beta", state=True),
]


def form_of(reference: Reference) -> Callable:
    """Their function with our arguments and layout."""
    module, name = reference.path.split(":")
    function = getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2) if reference.heads_first else x

    def form(q, k, v, g, beta, *, state):
        given = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
        tensors = [turned(given[argument]) for argument in reference.arguments.split()]
        options = {"initial_state": state, "output_final_state": True} if reference.state else {}
        found = function(*tensors, **options)
        o, final = found if isinstance(found, tuple) else (found, None)
        return (turned(o), final) if reference.state else (turned(o),)

    return form


@pytest.mark.parametrize("reference", REFERENCES, ids=str)
def test_it_equals_their_naive_function(reference):
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    x = inputs(reference.decay, reference.delta, LENGTH, batch=2, keys=32, values=48, dtype=torch.float32)
    if reference.decay == "constant":  # theirs makes it itself: 1 - 2^-5 and 1 - 2^-6 for two heads
        x["g"] = torch.log1p(-torch.tensor([2.0**-5, 2.0**-6]))
    elif x["g"] is not None:  # theirs take differences of cumulated decays, which are not exact for strong ones
        x["g"] = x["g"].detach().clamp(min=-0.1).requires_grad_()
    if not reference.state:
        x["state"] = None
    found = results(lambda *given, **options: recurrence(*given, **options)[: 1 + reference.state], x)
    assert_equal_results(found, results(form_of(reference), x), 5e-6)
