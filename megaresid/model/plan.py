"""The resolved model: shape and layer specs, checked before anything is built."""

from typing import Any

from megaresid.attention.mixer import MIXERS, Mixer
from megaresid.errors import UserError
from megaresid.model.presets import ModelShape
from megaresid.residual.stream import RESIDUALS, ResidualVariant
from megaresid.spec import Component, Options, Registry, fingerprint, parse_pattern


class ModelPlan:
    """Which residual variant and which mixer every layer has.

    ``residual`` and ``attention`` are patterns over the depth. Raises UserError for a shape that cannot be built,
    an unknown component or option, and residual variants that cannot follow each other.
    """

    def __init__(self, shape: ModelShape, attention: str = "softmax", residual: str = "vanilla"):
        if shape.width % shape.heads:
            raise UserError(f"width {shape.width} is not divisible by heads {shape.heads}: change one of them")
        self.shape = shape
        self._mixers = [MIXERS.resolve(c) for c in parse_pattern(attention).over(shape.layers)]
        self._residuals = self._resolve_residuals(residual)
        self._check_states()

    def _resolve_residuals(self, text: str) -> list[ResidualVariant]:
        made: dict[Component, ResidualVariant] = {}
        for component in (components := parse_pattern(text).over(self.shape.layers)):
            if component not in made:
                cls, options = RESIDUALS.resolve(component)
                made[component] = cls(self.shape, options)
        return [made[component] for component in components]

    def _check_states(self) -> None:
        for layer, (above, below) in enumerate(zip(self._residuals, self._residuals[1:]), start=1):
            gives, takes = above.state_spec(2 * layer), below.state_spec(2 * layer)
            if gives != takes:
                raise UserError(
                    f"layer {layer}: residual {below.name!r} reads a state of shapes {takes}, but {above.name!r} "
                    f"of layer {layer - 1} leaves {gives}: mix only variants with equal states"
                )

    @property
    def has_positions(self) -> bool:
        """Whether the model has learned position embeddings: when one of its mixers needs them."""
        return any(cls.needs_positions for cls, _ in self._mixers)

    def mixer_of(self, layer: int) -> Mixer:
        cls, options = self._mixers[layer]
        return cls(self.shape, options, layer)

    def mixer_class(self, layer: int) -> tuple[type[Mixer], Options]:
        return self._mixers[layer]

    def residual_of(self, layer: int) -> ResidualVariant:
        return self._residuals[layer]

    def tree(self) -> dict[str, Any]:
        """The whole plan with every default filled in, for ``spec.json``: what two runs must share to be one."""
        return {
            "schema": 1,
            "shape": self.shape.model_dump(),
            "layers": [
                {
                    "attention": {"name": _name(MIXERS, cls), **options.model_dump()},
                    "residual": {"name": _name(RESIDUALS, type(variant)), **variant.options.model_dump()},
                }
                for (cls, options), variant in zip(self._mixers, self._residuals)
            ],
        }

    @property
    def hash(self) -> str:
        """sha256 of the tree: the same for every way of writing the same plan."""
        return fingerprint(self.tree())


def _name(registry: Registry, cls: type) -> str:
    """The registered name of a component, or the import path of a user's own class (which may inherit a name)."""
    name = getattr(cls, "name", None)
    return name if registry.classes().get(name) is cls else f"{cls.__module__}:{cls.__qualname__}"
