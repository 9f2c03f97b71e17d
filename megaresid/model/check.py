"""A plan's promises held against its modules before anything is trained: what a user's own class may have got wrong."""

from collections.abc import Iterator

import torch
from torch._subclasses import FakeTensorMode

from megaresid.attention.cache import Cache
from megaresid.attention.mixer import SEGMENT, Chosen, Mixer, Side
from megaresid.errors import UserError
from megaresid.model.gpt import GPT, canonical_parameters, canonical_rules
from megaresid.model.init import Rule
from megaresid.model.plan import ModelPlan, component_name
from megaresid.spec import Options
from megaresid.users_code import CLASSES

TOKENS = 2  # of the sequence that is run through the layers
LENGTH, CUT = 8, 5  # of a text, and where it is cut to see what the parts have to do with each other


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


@torch.no_grad()
def check_users_mixers(plan: ModelPlan) -> None:
    """Run the user's own mixers on a short text. Raises UserError for one whose outputs change with later tokens (such
    a model sees what it is to predict, and its loss means nothing), with another document's where the plan keeps them
    apart, or, if it says that it decodes, where the text is cut in two."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in _layers_that_differ(plan):
            cls, options = plan.mixer_class(layer)
            if not _is_users(cls, options) or cls.needs_of(options):
                continue
            mixer = plan.mixer_of(layer).eval()
            for parameter in mixer.parameters():
                parameter.normal_(std=plan.shape.width**-0.5)
            if fault := _fault(mixer, plan, layer):
                raise UserError(f"layer {layer}: attention {component_name(cls)!r} {fault}")


def _fault(mixer: Mixer, plan: ModelPlan, layer: int) -> str | None:
    """What is wrong with what a mixer makes of a text, and its mend."""
    cls, options = plan.mixer_class(layer)
    x, other = torch.randn(2, 1, LENGTH, plan.shape.width)
    side = _side(plan, layer, LENGTH)
    early = torch.arange(LENGTH) < CUT
    whole = mixer(x, side)[0]
    if not _equal(whole[:, :CUT], mixer(torch.where(early[:, None], x, other), side)[0][:, :CUT]):
        return (
            f"is not causal: other tokens from {CUT} on change its outputs before them: let an output depend on tokens "
            "up to its own alone"
        )
    if plan.documents:
        side = tuple(
            tensor + (~early).int() if name == SEGMENT else tensor
            for tensor, (name, _) in zip(side, plan.side_spec(layer))
        )
        whole = mixer(x, side)[0]
        if not _equal(whole[:, CUT:], mixer(torch.where(early[:, None], other, x), side)[0][:, CUT:]):
            return (
                "reads the documents and does not keep them apart: another document's tokens change its outputs; use "
                "self.segment(side), and hand entering to super().__init__"
            )
    if cls.decodes_of(options):
        cache = Cache(LENGTH)
        pieces = zip(x.split(CUT, 1), zip(*(tensor.split(CUT, 1) for tensor in side)) if side else ((), ()))
        if not _equal(whole, torch.cat([mixer(*given, cache)[0] for given in pieces], 1)):
            return (
                "says that it decodes, and makes something else of a text in two pieces: carry in the cache what the "
                "second needs, or leave decodes False"
            )
    return None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To rounding."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item(), equal_nan=True)


def _is_users(cls: type[Mixer], options: Options) -> bool:
    inside = (value for _, value in options if isinstance(value, Chosen))
    return cls in CLASSES or any(_is_users(chosen.cls, chosen.options) for chosen in inside)


def _layers_that_differ(plan: ModelPlan) -> Iterator[int]:
    """Of the layers that have the same mixer and the same side channel, the first one."""
    seen = []
    for layer in range(plan.shape.layers):
        found = (*plan.mixer_class(layer), plan.side_spec(layer))
        if found not in seen:
            seen.append(found)
            yield layer


def _side(plan: ModelPlan, layer: int, length: int) -> Side:
    """A side channel as the layer is given it, of zeros."""
    return tuple(
        torch.zeros(1, length, *size, dtype=torch.int32 if name == SEGMENT else torch.float32)
        for name, size in plan.side_spec(layer)
    )


def _check_mixers(plan: ModelPlan) -> None:
    shape = plan.shape
    for layer in _layers_that_differ(plan):
        cls, options = plan.mixer_class(layer)
        entering = plan.side_spec(layer)
        given = plan.mixer_of(layer)(torch.zeros(1, TOKENS, shape.width), _side(plan, layer, TOKENS))
        told = f"layer {layer}: attention {component_name(cls)!r}"
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], tuple)):
            raise UserError(f"{told} does not return the pair (y, side), where side is a tuple: let its forward")
        y, side = given
        if tuple(y.shape) != (1, TOKENS, shape.width):
            raise UserError(
                f"{told} makes {list(y.shape)} of [1, {TOKENS}, {shape.width}]: let its forward return [B, T, C], as "
                "it is given"
            )
        if y.dtype != torch.float32:
            raise UserError(f"{told} makes {y.dtype} of torch.float32: let its forward return x's dtype")
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
