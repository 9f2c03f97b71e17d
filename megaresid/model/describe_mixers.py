"""Mixers as plain data: what each is, costs, carries, needs and excludes, at the shape of a model."""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc

import torch
from torch._subclasses import FakeTensorMode

from megaresid.attention.cache import Cache
from megaresid.attention.mixer import MIXERS, SEGMENT, Mixer
from megaresid.errors import UserError, suggestion
from megaresid.model.describe import (
    Option,
    ParameterRule,
    check_users_classes,
    only_component,
    options_of,
    rules_beside_vanilla,
    spoilt_by_bf16,
)
from megaresid.model.flops import forward_flops_per_token
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape
from megaresid.residual.stream import RESIDUALS, ResidualVariant
from megaresid.spec import Component, Options


@dataclass(frozen=True)
class MixerDescription:
    """A mixer in every layer of a model, beside softmax attention.

    ``stands_for`` and ``words`` are a preset's. ``added_parameters`` are without the learned position embeddings,
    which the model has with ``positions``. ``added_flops`` are those of a forward pass per token, the percentage is of
    vanilla's model. ``carried_bytes`` are kept for a text that is being generated, in fp32, and
    ``carried_bytes_a_token`` come with each of its tokens; both are None where it ``decodes`` not, and a text is run
    again for every token. All costs are None for what is not built: a mixer that needs what not every machine has, or
    one whose costs are those of the mixers that it is given. ``incompatible`` is what it cannot be trained with.
    """

    name: str
    stands_for: str
    words: str
    paper: str
    fidelity: str
    options: tuple[Option, ...]
    added_parameters: int | None
    added_flops: int | None
    added_flops_percent: float | None
    carried_bytes: int | None
    carried_bytes_a_token: int | None
    positions: bool | None
    decodes: bool
    needs: str
    incompatible: tuple[str, ...]


def describe_mixer(spec: str, shape: ModelShape) -> MixerDescription:
    """The mixer that ``spec`` names, ``name`` or ``name(option=1)``, in every layer. Raises UserError."""
    component = only_component(spec)
    if (cls := _without_its_options(component)) is not None:
        return _unbuilt(cls, None)
    cls, options = MIXERS.resolve(component)
    if cls.needs_of(options):
        return _unbuilt(cls, options)
    if ":" in spec:
        check_users_classes(ModelPlan(shape, spec))
    layers, softmax = _Layers(spec, shape), _Layers("softmax", shape)
    flops, vanilla_flops = layers.flops(), forward_flops_per_token(ModelPlan(shape))
    decodes = cls.decodes_of(options)
    carried = [layers.carried_bytes(length) for length in (shape.context, shape.context + 1)] if decodes else []
    a_token = carried[1] - carried[0] if decodes else None
    preset = MIXERS.presets().get(component.name)
    return MixerDescription(
        name=component.name if preset else MIXERS.name_of(cls),
        stands_for=preset.text if preset else "",
        words=preset.words if preset else "",
        paper=cls.citation,
        fidelity=cls.fidelity,
        options=() if preset else tuple(options_of(cls.Options, options)),
        added_parameters=layers.parameters() - softmax.parameters(),
        added_flops=flops - vanilla_flops["attention"],
        added_flops_percent=100 * (flops - vanilla_flops["attention"]) / sum(vanilla_flops.values()),
        carried_bytes=carried[0] - shape.context * a_token if decodes else None,
        carried_bytes_a_token=a_token,
        positions=cls.needs_positions(options),
        decodes=decodes,
        needs="",
        incompatible=tuple(layers.incompatible()),
    )


def describe_all_mixers(shape: ModelShape) -> list[MixerDescription]:
    """Every registered mixer with its default options, softmax first, then the others family by family, then the
    presets."""
    classes = MIXERS.classes()
    names = sorted(classes, key=lambda name: (name != "softmax", classes[name].__module__))
    return [describe_mixer(name, shape) for name in (*names, *MIXERS.presets())]


def names_a_mixer(spec: str) -> bool:
    """Whether ``spec`` names a mixer and not a residual variant. Raises UserError for a name that is neither's."""
    name = only_component(spec).name
    if ":" in name:
        cls = MIXERS.users_own(name)
        if not (isinstance(cls, type) and issubclass(cls, Mixer | ResidualVariant)):
            raise UserError(f"{name!r} is not a subclass of {MIXERS.base} or of {RESIDUALS.base}: derive it from one")
        return issubclass(cls, Mixer)
    mixers = MIXERS.classes().keys() | MIXERS.presets().keys()
    residuals = RESIDUALS.classes().keys()
    if name not in mixers | residuals:
        raise UserError(f"unknown residual or attention {name!r}: {suggestion(name, mixers | residuals)}")
    return name in mixers


def mixer_rules(spec: str, shape: ModelShape) -> list[ParameterRule]:
    """The rules of parameters that softmax attention has not, or treats otherwise; none for what is not built."""
    component = only_component(spec)
    if _without_its_options(component) is not None:
        return []
    cls, options = MIXERS.resolve(component)
    return [] if cls.needs_of(options) else rules_beside_vanilla(ModelPlan(shape, spec))


def mixer_documentation(spec: str) -> str:
    """The docstring of a mixer's class; of a preset, its words before it."""
    component = only_component(spec)
    cls = _without_its_options(component) or MIXERS.resolve(component)[0]
    texts = [cleandoc(cls.__doc__ or "")]
    if preset := MIXERS.presets().get(component.name):
        texts.insert(0, f"{preset.words}.")
    return "\n\n".join(texts)


def _without_its_options(component: Component) -> type[Mixer] | None:
    """The class of a registered name that needs options, and is given none."""
    cls = MIXERS.classes().get(component.name)
    bare = cls is not None and not component.options and not component.arguments
    return cls if bare and any(field.is_required() for field in cls.Options.model_fields.values()) else None


def _unbuilt(cls: type[Mixer], options: Options | None) -> MixerDescription:
    """``options`` None: of the class alone."""
    return MixerDescription(
        name=MIXERS.name_of(cls),
        stands_for="",
        words="",
        paper=cls.citation,
        fidelity=cls.fidelity,
        options=tuple(options_of(cls.Options, options)),
        added_parameters=None,
        added_flops=None,
        added_flops_percent=None,
        carried_bytes=None,
        carried_bytes_a_token=None,
        positions=None if options is None else cls.needs_positions(options),
        decodes=cls.decodes if options is None else cls.decodes_of(options),
        needs=cls.needs if options is None else cls.needs_of(options),
        incompatible=tuple(
            _refused(cls.ways, cls.reads) if options is None else _refused(cls.ways_of(options), cls.reads_of(options))
        ),
    )


class _Layers:
    """A mixer in every layer, of which the first and a later one are built: all the later ones are alike."""

    def __init__(self, spec: str, shape: ModelShape):
        self.shape, self.plan = shape, ModelPlan(shape.model_copy(update={"layers": 2}), spec)
        self.without_memory = FakeTensorMode()
        with self.without_memory:
            self.mixers = [self.plan.mixer_of(layer) for layer in range(2)]

    def _over_depth(self, first: int, later: int) -> int:
        return first + (self.shape.layers - 1) * later

    def parameters(self) -> int:
        return self._over_depth(*(sum(p.numel() for p in mixer.parameters()) for mixer in self.mixers))

    def flops(self) -> int:
        cls, options = self.plan.mixer_class(0)
        return self.shape.layers * cls.flops_per_token(self.shape, options)

    def carried_bytes(self, length: int) -> int:
        """For one text of ``length`` tokens, after its last one."""
        caches = Cache(length), Cache(length)
        with self.without_memory, torch.no_grad():
            for layer, cache in enumerate(caches):
                side = (torch.zeros(1, length, *size) for _, size in self.plan.side_spec(layer))
                self.mixers[layer](torch.zeros(1, length, self.shape.width), tuple(side), cache)
        return self._over_depth(*(cache.bytes() for cache in caches))

    def incompatible(self) -> Iterator[str]:
        cls, options = self.plan.mixer_class(0)
        yield from _refused(cls.ways_of(options), cls.reads_of(options))
        if spoilt_by_bf16(module for mixer in self.mixers for module in mixer.modules()):
            yield "bf16.enabled"


def _refused(ways: bool, reads: tuple[str, ...]) -> Iterator[str]:
    """By the plan: residual variants, and documents kept apart."""
    if not ways:
        yield from (f"residual {name}" for name, variant in RESIDUALS.classes().items() if variant.ways)
    if SEGMENT not in reads:
        yield "--separate-documents"
