"""The interface of mixers: what carries information between tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, InstanceOf, PlainSerializer
from torch import nn

from megaresid.attention.cache import Cache
from megaresid.attention.kind import Kind
from megaresid.errors import UserError
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading
from megaresid.spec import Component, Options, Registry, write

Side = tuple[torch.Tensor, ...]
SideSpec = tuple[tuple[str, tuple[int, ...]], ...]
"""Name, and shape after [B, T], of every tensor of a side channel."""

Inputs = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""One input [B, T, C], or three (x_q, x_k, x_v) from a residual variant with ``ways``."""

SEGMENT = "segment"
"""In the side channel where documents are kept apart: int32 [B, T], a number that rises by one at every document."""

MIXERS = Registry("attention", "megaresid.attention", "megaresid.attention.mixer:Mixer")


class Mixer(nn.Module):
    """Maps normed [B, T, C] to [B, T, C], causally: output t depends on inputs 0..t alone.

    It is bare (no norm of its input, no residual). ``citation`` and ``fidelity`` are as a residual variant's
    (``residual/stream.py``). ``entering`` is the side channel that reaches the layer. A parameter that does not start
    as ``model/init.py`` says is declared by ``parameter_rules``.
    """

    name: ClassVar[str]
    citation: ClassVar[str] = "not given"
    fidelity: ClassVar[str] = "own"
    needs: ClassVar[str] = ""
    """What it runs on, where that is not every machine: "a GPU and flash-linear-attention"."""
    ways: ClassVar[bool] = False
    """Whether x may be a tuple (x_q, x_k, x_v) of three inputs instead of one."""
    reads: ClassVar[tuple[str, ...]] = ()
    """The tensors of the side channel that it reads where they are there; what no later layer reads is dropped. One
    that does not read ``SEGMENT`` is refused where documents are kept apart."""
    decodes: ClassVar[bool] = False
    """Whether it goes on from a ``cache``; without, a text is run from its start for every token."""
    Options: ClassVar[type[Options]] = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__()
        names = [name for name, _ in entering]
        self._segment_at = names.index(SEGMENT) if SEGMENT in names else None

    @classmethod
    def make(cls, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()) -> "Mixer":
        """The mixer of a layer that the side channel ``entering`` reaches."""
        return cls(shape, options, layer, entering)

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        """``side`` is what mixers share over depth; a mixer returns it as it is or with its own entries added. With a
        ``cache``, x goes on where the last call with it ended."""
        raise UserError(f"attention {MIXERS.name_of(type(self))!r} has no forward(x, side, cache=None): give it one")

    def diagnose(self, x: Inputs, side: Side) -> Mapping[str, Reading]:
        """What it shows of itself in diagnostics, by name, for these inputs.

        Pure: recomputed from the inputs, without gradients, in evaluation mode; called while its parameters are whole.
        """
        return {}

    @classmethod
    def needs_of(cls, options: Options) -> str:
        """``needs`` with these options; of a mixer that has others inside it, theirs."""
        return cls.needs

    @classmethod
    def ways_of(cls, options: Options) -> bool:
        """``ways`` with these options."""
        return cls.ways

    @classmethod
    def reads_of(cls, options: Options) -> tuple[str, ...]:
        """``reads`` with these options."""
        return cls.reads

    @classmethod
    def decodes_of(cls, options: Options) -> bool:
        """``decodes`` with these options."""
        return cls.decodes

    def segment(self, side: Side) -> torch.Tensor | None:
        """The documents of the tokens, int32 [B, T], or None where they are not kept apart."""
        return None if self._segment_at is None else side[self._segment_at]

    @classmethod
    def check(cls, shape: ModelShape, options: Options) -> None:
        """Raises UserError for options that do not fit the shape; before anything is allocated."""

    @classmethod
    def needs_positions(cls, options: Options) -> bool:
        """Whether it cannot tell the order of tokens without position embeddings."""
        return False

    @classmethod
    def side_spec(cls, shape: ModelShape, options: Options, entering: SideSpec) -> SideSpec:
        """The side channel that ``forward`` returns for the one that it is given."""
        return entering

    @classmethod
    def kinds(cls, shape: ModelShape, options: Options) -> frozenset[Kind]:
        """The recurrences that it runs, with their sizes: what kernels must be able to do."""
        return frozenset()

    @classmethod
    def flops_per_token(cls, shape: ModelShape, options: Options) -> int:
        """Forward FLOPs per token of matrix products, convolutions and recurrences (by their definition, whatever form
        computes them), averaged over a context of ``shape.context`` tokens."""
        raise UserError(
            f"attention {MIXERS.name_of(cls)!r} does not say what it costs: give it a classmethod "
            "flops_per_token(shape, options), which MFU and the table of variants need"
        )


@dataclass(frozen=True)
class Chosen:
    """A mixer inside another's options, resolved: its class and its own options."""

    written_as: ClassVar[str] = "mixer"

    cls: type[Mixer]
    options: Options

    def __str__(self) -> str:
        return component_text(self.cls, self.options)


def component_text(cls: type[Mixer], options: Options) -> str:
    """A resolved mixer as a user writes it, with the options that are not their defaults."""
    fields = type(options).model_fields
    written = {
        name: write(value)
        for name, value in options
        if name not in fields or fields[name].is_required() or value != fields[name].default
    }
    bare = [*takewhile(written.__contains__, options.positional)]
    told = [*map(written.pop, bare), *(f"{name}={text}" for name, text in written.items())]
    return f"{MIXERS.name_of(cls)}({', '.join(told)})" if told else MIXERS.name_of(cls)


def _resolve(value: Any) -> Chosen:
    if isinstance(value, Chosen):
        return value
    component = Component(value) if isinstance(value, str) else value
    if not isinstance(component, Component):
        raise UserError(f"attention {write(value)}: expected a mixer, such as gla or causal_conv(kernel=4)")
    return Chosen(*MIXERS.resolve(component))


def _dump(chosen: Chosen) -> dict[str, Any]:
    return {"name": MIXERS.name_of(chosen.cls), **chosen.options.model_dump()}


MixerOption = Annotated[InstanceOf[Chosen], BeforeValidator(_resolve), PlainSerializer(_dump)]
"""Type of an option whose value is a mixer: ``blend(gla, causal_conv(kernel=4))``."""
