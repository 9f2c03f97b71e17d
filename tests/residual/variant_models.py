"""Small models of every residual variant, and what its definition makes of the same parameters.

A definition is a function ``define(x0, sublayers, p) -> hidden``, written from the paper with loops and without the
project's code: ``x0`` [B, T, C] are the embeddings, ``sublayers[i]`` is the bare sublayer i (attention for even i, MLP
for odd i; a tuple of three inputs q, k, v is given as three arguments), ``p`` gives the parameters, and ``hidden`` is
what the output matrix multiplies, after the final norm if there is one.
"""

from collections.abc import Callable, Mapping

from small_models import IDX
from torch import Tensor
from torch.nn import functional

from megaresid.model.gpt import GPT, canonical_parameters


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
