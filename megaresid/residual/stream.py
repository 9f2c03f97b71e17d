"""The interface of residual schemes: a stream that is opened, read and written at sites, and closed.

::

    state = opening(x0)                  # tuple of tensors
    for each sublayer, a Site:
        normed, context = site.enter(state)          # read, then the norm
        y, side         = sublayer(normed, side)
        state           = site.write(state, context, normed, y)
    hidden = close(state)                # close the stream, then the final norm

``side`` is what mixers share over depth; sites pass it on untouched. The state is a flat tuple of plain tensors
whose names and shapes depend on the place alone (``state_spec``), so that activation checkpointing, ``torch.compile``
and pipeline stages need nothing special. A history is a tuple of references, never a concatenation; no tensor stands
in it twice, and what no later site reads is not in it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megaresid.model.init import Rule
from megaresid.model.presets import ModelShape
from megaresid.readings import Reading
from megaresid.residual.cost import Cost
from megaresid.spec import Options, Registry

State = tuple[torch.Tensor, ...]
Normed = torch.Tensor | tuple[torch.Tensor, ...]

RESIDUALS = Registry("residual", "megaresid.residual", "megaresid.residual.stream:ResidualVariant")

SUBLAYERS = {
    "attention": ("attention",),
    "mlp": ("mlp",),
    "parallel": ("attention", "mlp"),
    "both": ("attention", "mlp"),
}
"""The sublayers that a site of each kind calls: one of them, both at one place, or one after the other."""


class Place(NamedTuple):
    """Where a site stands: ``index`` counts sublayers from 0 over the whole depth (two a layer, whatever the number of
    sites), ``kind`` is a key of ``SUBLAYERS``."""

    index: int
    layer: int
    kind: str


class Entry(NamedTuple):
    """One tensor of a state: what it is, and its shape after [B, T]."""

    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(map(str, self.shape))}]"


StateSpec = tuple[Entry, ...]


class Opening(nn.Module):
    """Makes the first state from the embeddings: x0 [B, T, C] -> state. Tensors of the state are distinct."""

    def __init__(self, shape: ModelShape, options: Options):
        super().__init__()

    def forward(self, x0: torch.Tensor) -> State:
        return (x0,)


class Site(nn.Module):
    """Wraps the call of one sublayer and owns all parameters and norms around it.

    The sublayer is bare: no norm, no residual. This base class is pre-LN (Xiong et al. 2020, arXiv 2002.04745),
    ``x + f(norm(x))``; a variant overrides ``read`` and ``write``. A parameter of its own, or one of a module below it
    that does not start as ``model/init.py`` says, is declared by ``parameter_rules``.
    """

    def __init__(self, shape: ModelShape, options: Options, place: Place):
        super().__init__()
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)

    def read(self, state: State) -> tuple[torch.Tensor, Any]:
        """The sublayer's input [B, T, C] before the norm, and a context that ``write`` gets back."""
        return state[0], None

    def enter(self, state: State) -> tuple[Normed, Any]:
        """What the sublayer gets: ``read``, then the norm. A tuple (q, k, v) for variants with ``ways``."""
        x, context = self.read(state)
        return self.norm(x), context

    def write(self, state: State, context: Any, normed: Normed, update: torch.Tensor) -> State:
        """The state after the sublayer's output ``update`` [B, T, C]."""
        return (state[0] + update, *state[1:])

    def forward(self, state: State, side: State, sublayer: nn.Module) -> tuple[State, State]:
        normed, context = self.enter(state)
        update, side = sublayer(normed, side)
        return self.write(state, context, normed, update), side

    def use(self, shared: Mapping[str, nn.Module]) -> None:
        """Take what the variant's ``shared`` made; it belongs to the model, so it must not be registered here."""

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        """What the site shows of itself in diagnostics, by name, for the state that it is given.

        Pure: recomputed from the state, without gradients, in evaluation mode; called while its parameters are whole.
        """
        return {}


class Close(nn.Module):
    """Ends the stream: one tensor from the state, then the final norm.

    ``state_length`` is how many of the tensors it is given are the state; the mixers' side channel comes after.
    """

    essential: ClassVar[bool] = False
    """Whether the variant is another without it, as where it has parameters of its own: a mix that ends otherwise is
    refused. A norm more or less, or a sum for a mean, is not essential."""

    def __init__(self, shape: ModelShape, options: Options, state_length: int):
        super().__init__()
        self.state_length = state_length
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)

    def close(self, state: State) -> torch.Tensor:
        return state[0]

    def diagnose(self, state: State) -> Mapping[str, Reading]:
        """As a site's, for the state that is closed."""
        return {}

    def forward(self, tensors: State) -> torch.Tensor:
        return self.norm(self.close(tensors[: self.state_length]))


class BareClose(Close):
    """The stream as it is, without a final norm."""

    def __init__(self, shape: ModelShape, options: Options, state_length: int):
        super().__init__(shape, options, state_length)
        self.norm = nn.Identity()


def recomputed(function, *tensors):
    """``function(*tensors)``, of which nothing is kept for the backward pass but the tensors: it runs again there.

    For what is cheap to compute and large to keep: the read of wide streams, the softmax over depth. ``function`` must
    not draw random numbers.
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


class ResidualVariant:
    """A published residual scheme: its modules, its citation, and what is known of it.

    ``citation`` names the paper. ``fidelity`` is ``"exact"``, ``"reconstructed: ..."`` with the points that the paper
    leaves open or that are otherwise here, or ``"own"``, also of a class that does not say. One object serves a whole
    plan; it holds no tensors.
    """

    name: ClassVar[str]
    citation: ClassVar[str] = "not given"
    fidelity: ClassVar[str] = "own"
    Options: ClassVar[type[Options]] = Options
    opening_class: ClassVar[type[Opening]] = Opening
    site_class: ClassVar[type[Site]] = Site
    close_class: ClassVar[type[Close]] = Close
    kinds: ClassVar[tuple[str, ...]] = ("attention", "mlp")
    ways: ClassVar[bool] = False
    """Whether its sites give attention a tuple (q, k, v) of inputs instead of one; the mixer must take it."""

    def __init__(self, shape: ModelShape, options: Options):
        """Raises UserError for options that do not fit the shape."""
        self.shape, self.options = shape, options

    @property
    def equals_vanilla(self) -> str:
        """What holds at initialisation against pre-LN with the same weights, for these options: ``"exactly"`` (to
        rounding), ``"up to epsilon"`` of the norms, or ``"no"``."""
        return "no"

    def opening(self) -> Opening:
        return self.opening_class(self.shape, self.options)

    def places(self, layer: int) -> list[Place]:
        """The sites of a layer, in the order in which they are called."""
        return [Place(2 * layer + offset, layer, kind) for offset, kind in enumerate(self.kinds)]

    def site(self, place: Place) -> Site:
        return self.site_class(self.shape, self.options, place)

    def shared(self) -> dict[str, nn.Module]:
        """Modules that all sites use, by name. The model owns them; a pipeline refuses a variant that has any."""
        return {}

    def state_spec(self, index: int) -> StateSpec:
        """The tensors that enter sublayer ``index`` (from 0 to 2 x layers, where the stream is closed), in order."""
        return (Entry("x", (self.shape.width,)),)

    def sublayer_rule(self, layer: int, name: str, rule: Rule) -> Rule:
        """The rule of a sublayer's own parameter ``name`` (``attention.q_proj.weight``) under this variant."""
        return rule

    def cost(self, place: Place) -> Cost:
        """What the site adds to vanilla's (for a parallel site: to vanilla's two)."""
        return Cost()

    def opening_cost(self) -> Cost:
        """What opening the stream adds to vanilla's."""
        return Cost()

    def closing_cost(self) -> Cost:
        """What closing the stream adds to vanilla's."""
        return Cost()

    def shared_cost(self) -> Cost:
        """The parameters of ``shared``."""
        return Cost()
