"""GPT-2's parameters under Hugging Face's names and under ours, both ways, bit for bit.

Its Conv1D stores a matrix as [inputs, outputs] where ours is [outputs, inputs], and one ``c_attn`` has what our q, k
and v projections have. Its embedding has no padding rows, and the output head is the same matrix in both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megaresid.model.presets import ModelShape

PREFIX = "transformer."
TOKENS = "embed.tokens.weight"


@dataclass(frozen=True)
class Pair:
    """One tensor of Hugging Face's, without the prefix, and the one or three of ours that it has; their shapes."""

    theirs: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False


def pairs(shape: ModelShape) -> list[Pair]:
    """All parameters of a GPT-2, in Hugging Face's order."""
    width, vector = shape.width, (shape.width,)
    found = [
        Pair("wte.weight", (TOKENS,), (shape.vocab_size, width)),
        Pair("wpe.weight", ("embed.positions.weight",), (shape.context, width)),
    ]
    for layer in range(shape.layers):
        ours, theirs = f"layers.{layer:02d}", f"h.{layer}"
        projections = [f"{ours}.attention.{which}_proj" for which in "qkv"]
        found += _norm(f"{theirs}.ln_1", f"{ours}.attention.site.norm", vector)
        found += _linear(f"{theirs}.attn.c_attn", projections, (width, 3 * width))
        found += _linear(f"{theirs}.attn.c_proj", [f"{ours}.attention.o_proj"], (width, width))
        found += _norm(f"{theirs}.ln_2", f"{ours}.mlp.site.norm", vector)
        found += _linear(f"{theirs}.mlp.c_fc", [f"{ours}.mlp.fc"], (width, 4 * width))
        found += _linear(f"{theirs}.mlp.c_proj", [f"{ours}.mlp.proj"], (4 * width, width))
    return found + _norm("ln_f", "head.norm", vector)


def _norm(theirs: str, ours: str, vector: tuple[int]) -> list[Pair]:
    return [Pair(f"{theirs}.{what}", (f"{ours}.{what}",), vector) for what in ("weight", "bias")]


def _linear(theirs: str, ours: list[str], shape: tuple[int, int]) -> list[Pair]:
    return [
        Pair(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), shape, transposed=True),
        Pair(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours), shape[1:]),
    ]


def to_gpt2(shape: ModelShape, ours: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face's name, tensor) from our (name, tensor), which come in the order of ``our_names``."""
    for pair in pairs(shape):
        parts = []
        for name in pair.ours:
            given, tensor = next(ours)
            if given != name:
                raise ValueError(f"{given} came for {name}")
            parts.append(tensor.T if pair.transposed else tensor)
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        yield PREFIX + pair.theirs, joined[: shape.vocab_size] if pair.ours == (TOKENS,) else joined


def our_names(shape: ModelShape) -> list[str]:
    return [name for pair in pairs(shape) for name in pair.ours]


def from_gpt2(shape: ModelShape, pair: Pair, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Our (name, tensor) that one tensor of Hugging Face's has; the embedding's padding rows are zero."""
    if pair.ours == (TOKENS,):
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, shape.padded_vocab_size - shape.vocab_size))
    for name, part in zip(pair.ours, tensor.chunk(len(pair.ours), dim=-1), strict=True):
        yield name, (part.T if pair.transposed else part).contiguous()


def our_shapes(shape: ModelShape) -> Mapping[str, list[int]]:
    """The shape of each parameter of ours, in the order of ``our_names``."""
    found = {}
    for pair in pairs(shape):
        size = [*pair.shape[:-1], pair.shape[-1] // len(pair.ours)]
        found |= {name: size[::-1] if pair.transposed else size for name in pair.ours}
    return found | {TOKENS: [shape.padded_vocab_size, shape.width]}
