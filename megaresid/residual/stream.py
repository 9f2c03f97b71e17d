"""The interface of residual schemes: a stream that is opened, read and written at sites, and closed.

::

    state = variant.open(x0)             # tuple of tensors
    for each sublayer, a Site:
        x, context = site.read(state)    # what the sublayer sees, [B, T, C]
        y, side    = sublayer(site.norm(x), side)
        state      = site.write(state, context, normed_x, y)
    hidden = close(state)                # close the stream, then the final norm

``side`` is what mixers share over depth; sites pass it on untouched. The state is a flat tuple of plain tensors
whose length depends on the site's index alone (``state_spec``), so that activation checkpointing, ``torch.compile``
and pipeline stages need nothing special.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from megaresid.model.presets import ModelShape
from megaresid.spec import Options, Registry

State = tuple[torch.Tensor, ...]

RESIDUALS = Registry("residual", "megaresid.residual")


class Place(NamedTuple):
    """Where a site stands: ``index`` counts sites from 0 over the whole depth, ``kind`` names its sublayer."""

    index: int
    layer: int
    kind: str


class Site(nn.Module):
    """Wraps the call of one sublayer and owns all parameters and norms around it.

    The sublayer is bare: no norm, no residual. This base class is pre-LN (Xiong et al. 2020, arXiv 2002.04745),
    ``x + f(norm(x))``; a variant overrides ``read`` and ``write``.
    """

    def __init__(self, shape: ModelShape, options: Options, place: Place):
        super().__init__()
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)

    def read(self, state: State) -> tuple[torch.Tensor, Any]:
        """The sublayer's input [B, T, C] before the norm, and a context that ``write`` gets back."""
        return state[0], None

    def write(self, state: State, context: Any, normed: torch.Tensor, update: torch.Tensor) -> State:
        """The state after the sublayer's output ``update`` [B, T, C]."""
        return (state[0] + update, *state[1:])

    def forward(self, state: State, sublayer: nn.Module, side: State) -> tuple[State, State]:
        x, context = self.read(state)
        normed = self.norm(x)
        update, side = sublayer(normed, side)
        return self.write(state, context, normed, update), side


class Close(nn.Module):
    """Ends the stream: one tensor from the state, then the final norm.

    ``state_length`` is how many of the tensors it is given are the state; the mixers' side channel comes after.
    """

    def __init__(self, shape: ModelShape, options: Options, state_length: int):
        super().__init__()
        self.state_length = state_length
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)

    def close(self, state: State) -> torch.Tensor:
        return state[0]

    def forward(self, tensors: State) -> torch.Tensor:
        return self.norm(self.close(tensors[: self.state_length]))


class ResidualVariant:
    """A published residual scheme: its modules, its citation, and what is known of it.

    ``equals_vanilla`` says what holds at initialisation against pre-LN with the same weights: ``"exactly"``,
    ``"up to epsilon"`` of the norm, or ``"no"``.
    """

    name: ClassVar[str]
    citation: ClassVar[str]
    equals_vanilla: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    site_class: ClassVar[type[Site]] = Site
    close_class: ClassVar[type[Close]] = Close

    def __init__(self, shape: ModelShape, options: Options):
        self.shape, self.options = shape, options

    def open(self, x0: torch.Tensor) -> State:
        """The first state from the embeddings x0 [B, T, C]."""
        return (x0,)

    def site(self, place: Place) -> Site:
        return self.site_class(self.shape, self.options, place)

    def state_spec(self, index: int) -> tuple[tuple[int, ...], ...]:
        """Shapes after [B, T] of the tensors that enter site ``index`` (from 0 to 2 x layers, where the stream is
        closed), in the state's order."""
        return ((self.shape.width,),)

    def flops_per_token(self, place: Place) -> int:
        """Forward FLOPs per token that the site adds to vanilla's."""
        return 0
