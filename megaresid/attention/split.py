"""Two mixers on two parts of the channels."""

import torch
from pydantic import Field

from megaresid import spec
from megaresid.attention.cache import Cache
from megaresid.attention.mixer import MIXERS, SEGMENT, Inputs, MixerOption, Side
from megaresid.attention.nested import Nested
from megaresid.errors import UserError
from megaresid.model.presets import ModelShape


class Options(spec.Options):
    positional = ("a", "b")

    a: MixerOption
    """The mixer of the first channels."""
    b: MixerOption
    """The mixer of the rest."""
    share: float = Field(0.5, gt=0, lt=1)
    """What a has of the heads, rounded down to whole heads."""


@MIXERS.register("split")
class Split(Nested):
    """y = [a(x_1), b(x_2)] for x = [x_1, x_2] over the channels.

    Each mixer sees a model as wide as its part, with as many heads as the part has. Nothing mixes the parts here; the
    MLP does. Two parts of half the width have half the parameters of one mixer.
    """

    citation = "this project"
    Options = Options

    def __init__(self, shape: ModelShape, options: Options, *arguments):
        super().__init__(shape, options, *arguments)
        self.widths = [self.shape_of(name, shape, options).width for name in ("a", "b")]

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        a, side = self.run("a", self.seen_by("a", x), side, cache)
        b, side = self.run("b", self.seen_by("b", x), side, cache)
        return torch.cat([a, b.to(a.dtype)], -1), side

    def seen_by(self, name: str, x: Inputs) -> Inputs:
        part = ("a", "b").index(name)
        if isinstance(x, tuple):
            return tuple(each.split(self.widths, -1)[part] for each in x)
        return x.split(self.widths, -1)[part]

    @classmethod
    def shape_of(cls, name: str, shape: ModelShape, options: Options) -> ModelShape:
        first = int(options.share * shape.heads)
        heads = first if name == "a" else shape.heads - first
        return shape.model_copy(update={"heads": heads, "width": heads * shape.width // shape.heads})

    @classmethod
    def check(cls, shape: ModelShape, options: Options) -> None:
        if int(options.share * shape.heads) == 0:
            raise UserError(
                f"attention 'split': share={options.share:g} of {shape.heads} heads is no whole head for its first "
                "mixer: give it more, or the model more heads"
            )
        super().check(shape, options)
        for mixer, inner, chosen in cls.inside(shape, options).values():
            handed = mixer.side_spec(inner, chosen, ())
            if handed or set(mixer.reads_of(chosen)) - {SEGMENT}:
                raise UserError(
                    f"attention 'split': {MIXERS.name_of(mixer)!r} shares tensors of the whole width over the layers, "
                    "and would see a part of it: choose another"
                )
