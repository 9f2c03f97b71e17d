"""Residual variants as plain data: what each is, costs, carries and excludes, at the shape of a model."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any

import torch
from torch import nn

from megaresid.attention.mixer import MIXERS
from megaresid.errors import UserError
from megaresid.model.flops import forward_flops_per_token, residual_cost, vanilla_saved_bytes_per_token
from megaresid.model.init import Normal, Rule, Start, Values
from megaresid.model.plan import ModelPlan, component_name
from megaresid.model.presets import ModelShape
from megaresid.residual.stream import RESIDUALS, ResidualVariant
from megaresid.spec import Component, Options, parse_pattern, type_name

BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
SHOWN = 4  # of a list of initial values


@dataclass(frozen=True)
class Option:
    """One option of a variant or mixer, with the value that it has here. What is ``required`` has no default; both are
    None where no value is given. A mixer as a value is what a user writes."""

    name: str
    type: str
    value: Any
    default: Any
    description: str
    required: bool = False


@dataclass(frozen=True)
class Tensor:
    """One tensor that crosses layers; its shape after [B, T]."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Description:
    """A variant over the whole depth of a model, beside vanilla.

    ``added_flops`` are those of a forward pass per token; ``added_bytes`` what is kept per token for the backward pass
    in fp32; the percentages are of vanilla's. All four are None for a user's own class that does not declare its
    ``cost``; ``added_parameters`` are counted from the modules. ``state`` enters the layer at mid-depth,
    ``tensors_at_end`` is how many tensors the stream has where it is closed. ``incompatible`` is what it cannot be
    trained with.
    """

    name: str
    paper: str
    fidelity: str
    options: tuple[Option, ...]
    added_parameters: int
    added_flops: int | None
    added_flops_percent: float | None
    added_bytes: int | None
    added_bytes_percent: float | None
    state: tuple[Tensor, ...]
    tensors_at_end: int
    equals_vanilla: str
    incompatible: tuple[str, ...]


@dataclass(frozen=True)
class ParameterRule:
    """Parameters (a glob where the layers agree) whose rule is not vanilla's, and the rule."""

    names: str
    start: str
    decay: bool
    lr_multiplier: float
    epsilon_multiplier: float
    fp32: bool


def describe(spec: str, shape: ModelShape) -> Description:
    """The variant that ``spec`` names, ``name`` or ``name(option=1)``, in every layer. Raises UserError."""
    only_component(spec)
    plan, vanilla = ModelPlan(shape, residual=spec), ModelPlan(shape)
    variant = plan.residual_of(0)
    if ":" in spec:
        check_users_classes(plan)
    cost = residual_cost(plan) if _declares_cost(variant) else None
    vanilla_flops = sum(forward_flops_per_token(vanilla).values())
    return Description(
        name=component_name(variant),
        paper=variant.citation,
        fidelity=variant.fidelity,
        options=tuple(options_of(type(variant.options), variant.options)),
        added_parameters=_parameters(variant) - _parameters(vanilla.residual_of(0)),
        added_flops=cost and cost.flops,
        added_flops_percent=cost and 100 * cost.flops / vanilla_flops,
        added_bytes=cost and cost.saved_bytes,
        added_bytes_percent=cost and 100 * cost.saved_bytes / vanilla_saved_bytes_per_token(shape),
        state=tuple(Tensor(entry.name, entry.shape) for entry in variant.state_spec(2 * (shape.layers // 2))),
        tensors_at_end=len(variant.state_spec(2 * shape.layers)),
        equals_vanilla=variant.equals_vanilla,
        incompatible=tuple(_incompatible(variant)),
    )


def only_component(spec: str) -> Component:
    """The one that ``spec`` names. Raises UserError for a pattern."""
    pattern = parse_pattern(spec)
    if len(pattern.components()) > 1 or pattern.terms[0][0] > 1:
        raise UserError(f"{spec!r} is a pattern over the depth: name one variant, such as {pattern.terms[0][1]}")
    return pattern.terms[0][1]


def check_users_classes(plan: ModelPlan) -> None:
    """A class of the user's own is described where it could be trained. Raises UserError."""
    # DeepSpeed comes with it, for which the tables of ours need not wait.
    from megaresid.model.check import check_states, check_users_mixers

    check_states(plan)
    check_users_mixers(plan)


def describe_all(shape: ModelShape) -> list[Description]:
    """Every registered variant with its default options, family by family."""
    classes = RESIDUALS.classes()
    return [describe(name, shape) for name in sorted(classes, key=lambda name: classes[name].__module__)]


def documentation(spec: str, shape: ModelShape) -> str:
    """The docstring of a variant's class."""
    return cleandoc(type(ModelPlan(shape, residual=spec).residual_of(0)).__doc__ or "")


def options_of(cls: type[Options], options: Options | None) -> Iterator[Option]:
    """Each option of a class, with the value in ``options`` or, without them, its default."""
    for name, field in cls.model_fields.items():
        bounds = [
            f"{sign} {getattr(bound, key):g}"
            for bound in field.metadata
            for key, sign in BOUNDS.items()
            if hasattr(bound, key)
        ]
        default = None if field.is_required() else field.default
        value = default if options is None else getattr(options, name)
        plain = value is None or isinstance(value, bool | int | float)
        kind = " ".join((type_name(field.annotation), ", ".join(bounds))).strip()
        yield Option(name, kind, value if plain else str(value), default, field.description or "", field.is_required())


def _declares_cost(variant: ResidualVariant) -> bool:
    """A registered variant does even where it says nothing: it adds nothing."""
    registered = RESIDUALS.classes().values()
    return type(variant) in registered or type(variant).cost is not ResidualVariant.cost


def _parameters(variant: ResidualVariant) -> int:
    return sum(parameter.numel() for module in _modules(variant) for parameter in module.parameters(recurse=False))


def _incompatible(variant: ResidualVariant) -> Iterator[str]:
    if variant.ways:
        yield from (f"attention {name}" for name, mixer in MIXERS.classes().items() if not mixer.ways)
    if variant.shared():
        yield "pipeline parallelism"
    if spoilt_by_bf16(_modules(variant)):
        yield "bf16.enabled"


def spoilt_by_bf16(modules: Iterable[nn.Module]) -> bool:
    """Whether they have a parameter or buffer that must not be rounded to bf16."""
    return any(
        any(buffer.is_floating_point() for buffer in module.buffers(recurse=False))
        or hasattr(module, "parameter_rules")
        and any(rule.fp32 for rule in module.parameter_rules().values())
        for module in modules
    )


def _modules(variant: ResidualVariant) -> Iterator[nn.Module]:
    """All that the variant makes for a model, without memory."""
    layers = variant.shape.layers
    with torch.device("meta"):
        yield from variant.opening().modules()
        for layer in range(layers):
            for place in variant.places(layer):
                yield from variant.site(place).modules()
        last = len(variant.state_spec(2 * layers))
        yield from variant.close_class(variant.shape, variant.options, last).modules()
        for module in variant.shared().values():
            yield from module.modules()


def rules_beside_vanilla(plan: ModelPlan) -> list[ParameterRule]:
    """The rules of parameters that vanilla with softmax attention has not, or treats otherwise; layers that agree are
    one entry."""
    # DeepSpeed comes with it, for which the table need not wait.
    from megaresid.model.gpt import GPT, canonical_rules

    def rules_of(plan: ModelPlan) -> dict[str, Rule]:
        with torch.device("meta"):
            model = GPT(plan)
        return canonical_rules(model, model.prefixes, plan)

    vanilla, starts = rules_of(ModelPlan(plan.shape)), {}
    for name, rule in rules_of(plan).items():
        if vanilla.get(name) != rule:
            names = re.sub(r"^layers\.\d+\.", "layers.*.", name)
            treatment = (names, rule.decay, rule.lr_multiplier, rule.epsilon_multiplier, rule.fp32)
            starts.setdefault(treatment, []).append(_start(rule.start))
    return [
        ParameterRule(names, found[0] if len(set(found)) == 1 else f"{found[0]} to {found[-1]}", *treatment)
        for (names, *treatment), found in starts.items()
    ]


def _start(start: Start) -> str:
    """In short: of many values, the first ones and how many there are."""
    if isinstance(start, Normal) and start.std == 0:
        return "0"
    if isinstance(start, Values) and len(start.values) > SHOWN:
        return f"{', '.join(f'{value:.3g}' for value in start.values[:SHOWN])}, … ({len(start.values)} values)"
    return str(start)
