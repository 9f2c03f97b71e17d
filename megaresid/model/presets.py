"""The shape of a model, and the named shapes of the GPT-2 family."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from megaresid.errors import UserError

GPT2_VOCABULARY = 50_257
GPT2_END_OF_TEXT = 50_256
VOCABULARY_MULTIPLE = 128  # tensor cores want the embedding matrix's height in whole tiles


class ModelShape(BaseModel):
    """What fixes every parameter's shape, apart from the layer specs. Frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: int
    heads: int
    width: int
    context: int
    vocab_size: int = GPT2_VOCABULARY
    end_of_text: int = GPT2_END_OF_TEXT
    dropout: float = 0.0
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    norm_epsilon: float = 1e-5

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix: ``vocab_size`` rounded up; the added rows are zero and never predicted."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


MOST = {"layers": 10_000, "heads": 2**16, "width": 2**20, "context": 2**24, "vocab_size": 2**24}
"""Far above what is trained, and low enough that what is built of it is told to be too large rather than hangs."""


def check_shape(shape: ModelShape) -> None:
    """Raises UserError for sizes of which no model is built."""
    for key, most in MOST.items():
        if not 1 <= (size := getattr(shape, key)) <= most:
            raise UserError(f"{key} {size}: a model has from 1 to {most:,}")
    if not (0 <= shape.dropout <= 1 and 0 <= shape.norm_epsilon < 1):
        raise UserError(f"dropout {shape.dropout}, norm_epsilon {shape.norm_epsilon}: numbers from 0 to 1")


PRESETS = {
    "tiny": ModelShape(layers=4, heads=4, width=128, context=256),
    "gpt2": ModelShape(layers=12, heads=12, width=768, context=1024),
    "gpt2-medium": ModelShape(layers=24, heads=16, width=1024, context=1024),
    "gpt2-large": ModelShape(layers=36, heads=20, width=1280, context=1024),
    "gpt2-xl": ModelShape(layers=48, heads=25, width=1600, context=1024),
}
