"""What tells one recurrence from another, and what it costs."""

from typing import Literal, NamedTuple


class Kind(NamedTuple):
    """One recurrence: its decay ("head" and "channel" are a token's own), whether it has the delta rule, and the sizes
    of a head's keys and values."""

    decay: Literal["none", "constant", "head", "channel"]
    delta: bool
    keys: int
    values: int


def recurrence_flops(kind: Kind, heads: int) -> int:
    """FLOPs per token of the definition, by the convention of ``residual/cost.py``, in so many heads."""
    state = kind.keys * kind.values
    flops = 4 * state + kind.values  # k v^T and its sum, S^T q and its scale
    if kind.decay != "none":
        flops += state + (kind.keys if kind.decay == "channel" else 1)  # exp(g) and its product with the state
    if kind.delta:
        flops += 2 * state + 2 * kind.values  # beta (v - S^T k)
    return heads * flops
