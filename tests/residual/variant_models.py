"""Small models of every residual variant, and what its definition makes of the same parameters.

A definition is a function ``define(x0, sublayers, p) -> hidden``, written from the paper with loops and without the
project's code: ``x0`` [B, T, C] are the embeddings, ``sublayers[i]`` is the bare sublayer i (attention for even i, MLP
for odd i; a tuple of three inputs q, k, v is given as three arguments), ``p`` gives the parameters, and ``hidden`` is
what the output matrix multiplies, after the final norm if there is one.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from megaresid.model.gpt import GPT, build, canonical_parameters, set_step
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape

SHAPE = ModelShape(layers=4, heads=2, width=32, context=8, vocab_size=40)
IDX = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))


class Parameters:
    """A model's parameters by canonical name, cut as definitions want them."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Those whose names begin with ``prefix.``, by the rest of their names."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(f"{prefix}.")}

    def site(self, index: int) -> dict[str, Tensor]:
        """Those of the site around sublayer ``index``, by local name."""
        return self.below(f"layers.{index // 2:02d}.{('attention', 'mlp')[index % 2]}.site")

    @property
    def head(self) -> dict[str, Tensor]:
        """Those of the stream's close, by local name."""
        return self.below("head")


def layer_norm(x: Tensor, p: Mapping[str, Tensor], name: str = "norm", eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis, with the weight and bias ``p[name.weight]`` and ``p[name.bias]``."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def model_of(
    spec: str,
    shape: ModelShape = SHAPE,
    away: float = 0.2,
    dtype: torch.dtype = torch.float64,
    step: int = 0,
    recompute: bool = False,
    attention: str = "softmax",
) -> GPT:
    """A model with every parameter moved away from its start by N(0, ``away``); 0 leaves it there.

    The noise depends on the parameter's name alone, so what two variants share stays equal.
    """
    model = build(ModelPlan(shape, attention, spec), seed=0, activation_checkpointing=recompute).to(dtype)
    set_step(model, step)
    move_away(canonical_parameters(model, model.prefixes), away, shape.vocab_size)
    return model


@torch.no_grad()
def move_away(parameters: Mapping[str, Tensor], away: float, vocab_size: int) -> None:
    """Add N(0, ``away``) to every parameter, by canonical name; the embedding's padding rows stay zero."""
    for name, parameter in parameters.items():
        generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter += away * noise.to(parameter.dtype)
    parameters["embed.tokens.weight"][vocab_size:] = 0


def loss_of(model: Callable, idx: Tensor = IDX) -> Tensor:
    return model(idx[:, :-1], idx[:, 1:])[1]


def gradients_of(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    """By canonical name; None for a parameter that the loss does not depend on."""
    parameters = canonical_parameters(model, model.prefixes)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)))


def logits_by_definition(model: GPT, define: Callable, idx: Tensor) -> Tensor:
    """The logits [B, T, vocabulary] that ``define`` gives with the model's parameters and bare sublayers."""
    p = canonical_parameters(model, model.prefixes)

    def bare(module):
        return lambda *x: module(x if len(x) > 1 else x[0], ())[0]

    layers = model.parts[2 : 2 + model.shape.layers]
    sublayers = [bare(module) for layer in layers for module in (layer.attention, layer.mlp)]
    x0 = p["embed.tokens.weight"][idx] + p["embed.positions.weight"][: idx.shape[1]]
    return define(x0, sublayers, Parameters(p)) @ p["embed.tokens.weight"][: model.shape.vocab_size].T


def loss_by_definition(model: GPT, define: Callable, idx: Tensor = IDX) -> Tensor:
    logits = logits_by_definition(model, define, idx[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
