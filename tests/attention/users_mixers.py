"""Mixers as a user writes them, in a file of its own: one that is right, and what others get wrong."""

import torch
from torch import nn

from megaresid import spec
from megaresid.attention.mixer import Mixer
from megaresid.model.init import Constant, Rule


class MeanOptions(spec.Options):
    start: float = 1.0
    """What the mean is multiplied by before anything is learned."""


class Mean(Mixer):
    """y_t = W (g * mean(x_0, ..., x_t)), g a learned number for every channel."""

    citation = "me"
    Options = MeanOptions

    def __init__(self, shape, options, layer, entering=()):
        super().__init__(shape, options, layer, entering)
        self.start = options.start
        self.gain = nn.Parameter(torch.empty(shape.width))
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def parameter_rules(self):  # of what is not a Linear, a LayerNorm or an Embedding
        return {"gain": Rule(Constant(self.start), decay=False)}

    def forward(self, x, side, cache=None):  # x [B, T, C]; side is handed on
        tokens = torch.arange(1, x.shape[1] + 1, device=x.device)
        return self.o_proj(self.gain * x.cumsum(1) / tokens[:, None]), side

    @classmethod
    def flops_per_token(cls, shape, options):  # of matrix products
        return 2 * shape.width**2


class Costless(Mixer):
    def forward(self, x, side, cache=None):
        return x, side


class Free(Costless):
    @classmethod
    def flops_per_token(cls, shape, options):
        return 0


class NoMixer(nn.Module):
    pass


class ForeignOptions(Free):
    Options = dict


class NoRule(Mean):
    def parameter_rules(self):
        return {}


class Misnamed(Mean):
    def parameter_rules(self):
        return {"gian": Rule(Constant(1.0), decay=False)}


class Narrow(Free):
    def forward(self, x, side, cache=None):
        return x[..., 1:], side


class Late(Free):
    def forward(self, x, side, cache=None):
        return x[:, 1:], side


class Alone(Free):
    def forward(self, x, side, cache=None):
        return x


class Undeclared(Free):
    def forward(self, x, side, cache=None):
        return x, (*side, x)


class Promised(Free):
    reads = ("extra",)

    @classmethod
    def side_spec(cls, shape, options, entering):
        return (*entering, ("extra", (3,)))


class Double(Free):
    def forward(self, x, side, cache=None):
        return x.double(), side


class Deaf(Mean):
    """Says that it keeps documents apart."""

    reads = ("segment",)


class Forgetful(Mean):
    """Says that it goes on from a cache."""

    decodes = True


class WithoutCache(Free):
    decodes = True

    def forward(self, x, side):
        return x, side


class Ahead(Free):
    def forward(self, x, side, cache=None):
        return x.flip(1), side


class Wrong(Free):
    def forward(self, x, side, cache=None):
        return x @ x, side


class OfAnotherInterface(Free):
    def __init__(self, shape, options, layer):
        super().__init__(shape, options, layer)


class Idle(Mixer):
    @classmethod
    def flops_per_token(cls, shape, options):
        return 0
