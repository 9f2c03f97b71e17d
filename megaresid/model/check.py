"""A plan's promises held against its modules before anything is trained: what a user's own class may have got wrong."""

import torch
from torch._subclasses import FakeTensorMode

from megaresid.attention.mixer import SEGMENT
from megaresid.errors import UserError
from megaresid.model.gpt import GPT, canonical_parameters, canonical_rules
from megaresid.model.init import Rule
from megaresid.model.plan import ModelPlan, component_name

TOKENS = 2  # of the sequence that is run through the layers


def complete_rules(model: GPT) -> dict[str, Rule]:
    """The rules of all parameters by canonical name. Raises UserError for a parameter that has none."""
    try:
        rules = canonical_rules(model, model.prefixes, model.plan)
    except KeyError as error:  # rules of parameters that are not there
        raise UserError(error.args[0]) from None
    for name in canonical_parameters(model, model.prefixes):
        if name not in rules:
            raise UserError(
                f"no initial value is declared for {name}: let parameter_rules() of the module that owns it return "
                "its Rule"
            )
    return rules


@torch.no_grad()
def check_states(plan: ModelPlan) -> None:
    """Run a plan's layers on fake tensors, which have no memory, and hold what leaves every mixer against the interface
    and its ``side_spec``, and what leaves every part against the variants' ``state_spec``. Raises UserError."""
    with FakeTensorMode():
        _check_mixers(plan)
        _check_states(plan)


def _check_mixers(plan: ModelPlan) -> None:
    """Of the layers that have the same mixer and the same side channel, the first one."""
    shape, seen = plan.shape, []
    for layer in range(shape.layers):
        cls, options = plan.mixer_class(layer)
        entering = plan.side_spec(layer)
        if (cls, options, entering) in seen:
            continue
        seen.append((cls, options, entering))
        dtypes = (torch.int32 if name == SEGMENT else torch.float32 for name, _ in entering)
        side = tuple(torch.zeros(1, TOKENS, *size, dtype=dtype) for (_, size), dtype in zip(entering, dtypes))
        given = plan.mixer_of(layer)(torch.zeros(1, TOKENS, shape.width), side)
        told = f"layer {layer}: attention {component_name(cls)!r}"
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], tuple)):
            raise UserError(f"{told} does not return the pair (y, side), where side is a tuple: let its forward")
        y, side = given
        if tuple(y.shape) != (1, TOKENS, shape.width):
            raise UserError(
                f"{told} makes {list(y.shape)} of [1, {TOKENS}, {shape.width}]: let its forward return [B, T, C], as "
                "it is given"
            )
        promised = cls.side_spec(shape, options, entering)
        if [tuple(tensor.shape[2:]) for tensor in side] != [size for _, size in promised]:
            found = ", ".join(str(list(tensor.shape[2:])) for tensor in side)
            said = ", ".join(f"{name}{list(size)}" for name, size in promised)
            raise UserError(
                f"{told} gives a side channel of shapes ({found}) after [B, T], and its side_spec promises ({said}): "
                "make them agree"
            )


def _check_states(plan: ModelPlan) -> None:
    model, layers = GPT(plan), plan.shape.layers
    x = torch.zeros(1, TOKENS, dtype=torch.int64)
    for position, part in enumerate(model.parts[:-1]):
        x = part(x)
        if position == 0:
            continue
        layer = position - 1  # that it enters
        variant = plan.residual_of(max(layer - 1, 0))
        promised = [(name, shape) for name, shape in (*variant.state_spec(2 * layer), *plan.side_spec(layer))]
        if [tuple(tensor.shape[2:]) for tensor in x] != [shape for _, shape in promised]:
            found = ", ".join(str(list(tensor.shape[2:])) for tensor in x)
            said = ", ".join(f"{name}{list(shape)}" for name, shape in promised)
            giver = f"layer {layer - 1}" if layer else "the opening"
            raise UserError(
                f"residual {component_name(variant)!r}: {giver} of {layers} gives tensors of shapes ({found}) after "
                f"[B, T], and state_spec({2 * layer}) promises ({said}): make them agree"
            )
