"""The resolved model: shape and layer specs, checked before anything is built."""

from typing import Any, Literal

import torch

from megaresid.attention.kernels.self_check import routes_of
from megaresid.attention.kind import Kind
from megaresid.attention.mixer import MIXERS, SEGMENT, Mixer, SideSpec
from megaresid.errors import UserError
from megaresid.model.presets import ModelShape, check_shape
from megaresid.residual.stream import RESIDUALS, Opening, ResidualVariant, StateSpec
from megaresid.spec import Component, Options, fingerprint, parse_pattern


class ModelPlan:
    """Which residual variant and which mixer every layer has.

    ``residual`` and ``attention`` are patterns over the depth. ``positions`` are learned position embeddings; "auto"
    has them where a mixer needs them. With ``documents`` no token sees another document's. Raises UserError for a shape
    that cannot be built, an unknown component or option, residual variants that cannot follow each other, that share a
    module of one name, or whose opening or end would be lost, a residual variant with several inputs for a mixer that
    takes one, and a mixer that does not fit the shape or cannot keep documents apart.
    """

    def __init__(
        self,
        shape: ModelShape,
        attention: str = "softmax",
        residual: str = "vanilla",
        positions: Literal["auto", "learned", "none"] = "auto",
        documents: bool = False,
    ):
        check_shape(shape)
        if shape.width % shape.heads:
            raise UserError(f"width {shape.width} is not divisible by heads {shape.heads}: change one of them")
        self.shape, self.positions, self.documents = shape, positions, documents
        self.attention, self.residual = attention, residual  # as they were written
        mixers = parse_pattern(attention)
        for component in mixers.components():  # also those that the depth does not reach
            MIXERS.resolve(component)
        self._mixers = [MIXERS.resolve(component) for component in mixers.over(shape.layers)]
        for cls, options in self._mixers:
            cls.check(shape, options)
        self._residuals = self._resolve_residuals(residual)
        self._check_states()
        self._check_ends()
        self._check_shared()
        self._check_ways()
        self._check_documents()
        self._sides = self._follow_sides()

    def _resolve_residuals(self, text: str) -> list[ResidualVariant]:
        made: dict[Component, ResidualVariant] = {}
        pattern = parse_pattern(text)
        for component in pattern.components():
            RESIDUALS.resolve(component)
        for component in (components := pattern.over(self.shape.layers)):
            if component not in made:
                cls, options = RESIDUALS.resolve(component)
                made[component] = cls(self.shape, options)
        return [made[component] for component in components]

    def _check_states(self) -> None:
        for layer, (above, below) in enumerate(zip(self._residuals, self._residuals[1:]), start=1):
            gives, takes = above.state_spec(2 * layer), below.state_spec(2 * layer)
            if gives != takes:
                raise UserError(
                    f"layer {layer}: residual {component_name(below)!r} reads the state ({_layout(takes)}), but "
                    f"{component_name(above)!r} of layer {layer - 1} leaves ({_layout(gives)}): mix only variants with "
                    "equal states"
                )

    def _check_ends(self) -> None:
        """The first layer opens the stream and the last one closes it: what others would do must be the same."""
        first, last = self._residuals[0], self._residuals[-1]
        for layer, variant in enumerate(self._residuals):
            if variant.opening_class not in (Opening, first.opening_class):
                raise UserError(
                    f"layer {layer}: residual {component_name(variant)!r} opens the stream in a way of its own, and its "
                    "opening counts in layer 0 only: put it first"
                )
            if variant.close_class.essential and variant.close_class is not last.close_class:
                raise UserError(
                    f"layer {layer}: residual {component_name(variant)!r} ends the stream in a way of its own, and its "
                    "end counts in the last layer only: put it last"
                )

    def _check_shared(self) -> None:
        owners: dict[str, ResidualVariant] = {}
        for variant in self.variants():
            with torch.device("meta"):  # only the names are asked for: no memory and no random number
                names = variant.shared().keys()
            for name in names:
                if name in owners:
                    raise UserError(
                        f"residual {component_name(variant)!r} shares a module {name!r} over all layers, and so does "
                        f"{component_name(owners[name])!r}: give it one set of options"
                    )
                owners[name] = variant

    def _check_ways(self) -> None:
        for layer, (variant, (mixer, options)) in enumerate(zip(self._residuals, self._mixers)):
            if variant.ways and not mixer.ways_of(options):
                raise UserError(
                    f"layer {layer}: residual {component_name(variant)!r} gives attention separate inputs for q, k and "
                    f"v, and attention {component_name(mixer)!r} takes one: choose another of the two"
                )

    def _check_documents(self) -> None:
        if not self.documents:
            return
        if self.shape.end_of_text >= self.shape.vocab_size:
            raise UserError(
                f"documents are kept apart at <|endoftext|>, id {self.shape.end_of_text}, which a vocabulary of "
                f"{self.shape.vocab_size} has not: turn it off"
            )
        for layer, (mixer, options) in enumerate(self._mixers):
            if SEGMENT not in mixer.reads_of(options):
                raise UserError(
                    f"layer {layer}: attention {component_name(mixer)!r} cannot keep documents apart: turn it off, or "
                    "choose another"
                )

    def _follow_sides(self) -> list[SideSpec]:
        """The side channel that enters each layer, and what leaves the last: only what a later layer reads."""
        sides: list[SideSpec] = [((SEGMENT, ()),) if self.documents else ()]
        for layer, (mixer, options) in enumerate(self._mixers):
            later = {name for cls, chosen in self._mixers[layer + 1 :] for name in cls.reads_of(chosen)}
            made = mixer.side_spec(self.shape, options, sides[-1])
            sides.append(tuple(entry for entry in made if entry[0] in later))
        return sides

    def side_spec(self, layer: int) -> SideSpec:
        """The side channel that enters a layer; at ``shape.layers``, what leaves the last."""
        return self._sides[layer]

    def side_kept(self, layer: int) -> tuple[int, ...]:
        """Positions, in the side channel that the layer's mixer returns, of what goes on to the next layer."""
        mixer, options = self._mixers[layer]
        made = mixer.side_spec(self.shape, options, self._sides[layer])
        return tuple(position for position, entry in enumerate(made) if entry in self._sides[layer + 1])

    @property
    def has_positions(self) -> bool:
        """Whether the model has learned position embeddings."""
        if self.positions == "auto":
            return bool(self._in_need_of_positions())
        return self.positions == "learned"

    def _in_need_of_positions(self) -> list[str]:
        """The mixers' names, one a layer that has such a mixer."""
        return [component_name(cls) for cls, options in self._mixers if cls.needs_positions(options)]

    def describe_positions(self) -> str:
        """Whether the model has learned positions, and why; and whether it keeps documents apart."""
        in_need = self._in_need_of_positions()
        needed = f"{', '.join(dict.fromkeys(in_need))} in {len(in_need)} of {self.shape.layers} layers"
        if self.positions == "auto":
            words = f"learned, for {needed}" if in_need else "none, for no mixer needs them"
        else:
            unmet = f", though {needed} cannot tell the order of tokens without"
            words = f"{self.positions}, as asked{unmet if in_need and not self.has_positions else ''}"
        return words + ("; documents kept apart" if self.documents else "")

    def mixer_of(self, layer: int) -> Mixer:
        cls, options = self._mixers[layer]
        return cls.make(self.shape, options, layer, self._sides[layer])

    def mixer_class(self, layer: int) -> tuple[type[Mixer], Options]:
        return self._mixers[layer]

    def kinds(self) -> frozenset[Kind]:
        """The recurrences of all mixers, with their sizes."""
        return frozenset().union(*(cls.kinds(self.shape, options) for cls, options in self._mixers))

    def one_graph(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the model compiles to one graph on a device, with products in ``dtype``: on a GPU every call of one
        of flash-linear-attention's kernels or layers breaks it."""
        kernels = any(route.kernel for route in routes_of(self.kinds(), device, dtype).values())
        return not kernels and not any(cls.needs_of(options) for cls, options in self._mixers)

    def residual_of(self, layer: int) -> ResidualVariant:
        return self._residuals[layer]

    def variants(self) -> list[ResidualVariant]:
        """The plan's residual variants, each once, in the order of the depth."""
        return list(dict.fromkeys(self._residuals))

    def tree(self) -> dict[str, Any]:
        """The whole plan with every default filled in, for ``spec.json``: what two runs must share to be one."""
        return {
            "schema": 1,
            "shape": self.shape.model_dump(),
            "positions": self.has_positions,
            "documents": self.documents,
            "layers": [
                {
                    "attention": {"name": component_name(cls), **options.model_dump()},
                    "residual": {"name": component_name(variant), **variant.options.model_dump()},
                }
                for (cls, options), variant in zip(self._mixers, self._residuals)
            ],
        }

    @property
    def hash(self) -> str:
        """sha256 of the tree: the same however patterns, presets and defaults are written. An option that is left to
        the shape is not the same as its value written out."""
        return fingerprint(self.tree())


def component_name(component: ResidualVariant | type[Mixer]) -> str:
    """The registered name of a component, or the import path of a user's own class (which may inherit a name)."""
    return MIXERS.name_of(component) if isinstance(component, type) else RESIDUALS.name_of(type(component))


def _layout(spec: StateSpec) -> str:
    return ", ".join(map(str, spec))
