"""Mixers made of other mixers."""

from collections.abc import Mapping

import torch

from megaresid.attention.cache import Cache
from megaresid.attention.kind import Kind
from megaresid.attention.mixer import SEGMENT, Chosen, Inputs, Mixer, Side, SideSpec
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading
from megaresid.spec import Options


class Nested(Mixer):
    """Has a mixer inside for every option whose value is one, as the submodule of that name.

    What it reads, needs and can do is what they read, need and can do. The side channel passes through them in order.
    A subclass says what it makes of their outputs, adds the FLOPs of its own and, where they do not see the whole
    width, their shape.
    """

    ways = True  # and the others below; of one with its options, the classmethods say
    reads = (SEGMENT,)
    decodes = True

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.hands_on: dict[str, bool] = {}
        for name, (cls, inner, chosen) in self.inside(shape, options).items():
            self.add_module(name, cls.make(inner, chosen, layer, entering))
            left = cls.side_spec(inner, chosen, entering)
            self.hands_on[name], entering = left != entering, left

    def run(self, name: str, x: Inputs, side: Side, cache: Cache | None) -> tuple[torch.Tensor, Side]:
        """The mixer ``name`` with its own part of the cache."""
        mixer = self.get_submodule(name)
        return mixer(x, side) if cache is None else mixer(x, side, cache.inside(name))

    def seen_by(self, name: str, x: Inputs) -> Inputs:
        """What of x the mixer ``name`` sees."""
        return x

    def diagnose(self, x: Inputs, side: Side) -> Mapping[str, Reading]:
        """Those of the mixers inside, each after the mixer's name: ``"a.decay"``."""
        readings = {}
        for name, hands_on in self.hands_on.items():
            seen = self.seen_by(name, x)
            inner = self.get_submodule(name).diagnose(seen, side)
            readings |= {f"{name}.{reading}": value for reading, value in inner.items()}
            if hands_on:  # the next one reads what it adds to the side channel
                _, side = self.run(name, seen, side, None)
        return readings

    @classmethod
    def shape_of(cls, name: str, shape: ModelShape, options: Options) -> ModelShape:
        """The shape that the mixer ``name`` sees."""
        return shape

    @classmethod
    def own_flops_per_token(cls, shape: ModelShape, options: Options) -> int:
        """Beside those of the mixers inside."""
        return 0

    @classmethod
    def inside(cls, shape: ModelShape, options: Options) -> dict[str, tuple[type[Mixer], ModelShape, Options]]:
        """Each mixer inside: its class, the shape that it sees, its options."""
        return {
            name: (chosen.cls, cls.shape_of(name, shape, options), chosen.options)
            for name, chosen in chosen_in(options).items()
        }

    @classmethod
    def check(cls, shape: ModelShape, options: Options) -> None:
        for mixer, inner, chosen in cls.inside(shape, options).values():
            mixer.check(inner, chosen)

    @classmethod
    def side_spec(cls, shape: ModelShape, options: Options, entering: SideSpec) -> SideSpec:
        for mixer, inner, chosen in cls.inside(shape, options).values():
            entering = mixer.side_spec(inner, chosen, entering)
        return entering

    @classmethod
    def kinds(cls, shape: ModelShape, options: Options) -> frozenset[Kind]:
        inside = cls.inside(shape, options).values()
        return frozenset().union(*(mixer.kinds(inner, chosen) for mixer, inner, chosen in inside))

    @classmethod
    def flops_per_token(cls, shape: ModelShape, options: Options) -> int:
        inside = cls.inside(shape, options).values()
        theirs = sum(mixer.flops_per_token(inner, chosen) for mixer, inner, chosen in inside)
        return theirs + cls.own_flops_per_token(shape, options)

    @classmethod
    def needs_positions(cls, options: Options) -> bool:
        return any(chosen.cls.needs_positions(chosen.options) for chosen in chosen_in(options).values())

    @classmethod
    def needs_of(cls, options: Options) -> str:
        needs = [chosen.cls.needs_of(chosen.options) for chosen in chosen_in(options).values()]
        return "; ".join(dict.fromkeys(filter(None, needs)))

    @classmethod
    def ways_of(cls, options: Options) -> bool:
        return all(chosen.cls.ways_of(chosen.options) for chosen in chosen_in(options).values())

    @classmethod
    def reads_of(cls, options: Options) -> tuple[str, ...]:
        """All that any of them reads; the documents only if all do, for one that does not would mix them."""
        theirs = [chosen.cls.reads_of(chosen.options) for chosen in chosen_in(options).values()]
        apart = all(SEGMENT in names for names in theirs)
        return tuple(dict.fromkeys(name for names in theirs for name in names if apart or name != SEGMENT))

    @classmethod
    def decodes_of(cls, options: Options) -> bool:
        return all(chosen.cls.decodes_of(chosen.options) for chosen in chosen_in(options).values())


def chosen_in(options: Options) -> dict[str, Chosen]:
    """The options whose values are mixers, in their order."""
    return {name: value for name, value in options if isinstance(value, Chosen)}

