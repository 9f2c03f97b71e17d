"""A folder of Hugging Face GPT-2 weights, or one on the Hub, read as a model of ours. Nothing is unpickled."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megaresid.errors import UserError
from megaresid.exchange.gpt2_config import shape_of
from megaresid.exchange.gpt2_names import PREFIX, Pair, from_gpt2, our_names, our_shapes, pairs
from megaresid.exchange.restore import check_fit, filled
from megaresid.exchange.weights import INDEX, SINGLE, Weights
from megaresid.json_text import parse_json
from megaresid.model.gpt import GPT
from megaresid.model.plan import ModelPlan

CONFIG, PICKLED = "config.json", "pytorch_model.bin"
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old files have
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class GPT2Folder:
    """A ``Saved`` (see ``saved_run``) of a folder of ``config.json`` and safetensors files in Hugging Face's form.

    Raises UserError where it is no GPT-2 that we have, lacks a weight or has one that GPT-2 has not.
    """

    folder: Path
    source: str
    step: int = 0
    dtype: None = None
    config: None = None
    data: None = None

    def __post_init__(self) -> None:
        if not (self.folder / SINGLE).is_file() and not (self.folder / INDEX).is_file():
            pickled = (self.folder / PICKLED).is_file() or any(self.folder.glob("pytorch_model*.bin*"))
            why = "its weights are pickles, which may run code: save them as safetensors" if pickled else "no weights"
            raise UserError(f"--from {self.folder}: {why}; {SINGLE} is read, or files with {INDEX}")
        with Weights(self.folder) as weights:
            self._check(weights)
        check_fit(self.plan, our_shapes(self.plan.shape), str(self.folder))

    @property
    def weights(self) -> Path:
        return self.folder

    @cached_property
    def plan(self) -> ModelPlan:
        path = self.folder / CONFIG
        try:
            config = parse_json(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}") from None
        if not isinstance(config, dict):
            raise UserError(f"{path}: expected an object of keys and values")
        return ModelPlan(shape_of(config, str(path)), positions="learned")

    def _check(self, weights: Weights) -> None:
        wanted = {pair.theirs: list(pair.shape) for pair in pairs(self.plan.shape)}
        found = {name.removeprefix(PREFIX): name for name in weights.shapes}
        for name, shape in wanted.items():
            if name not in found:
                raise UserError(f"--from {self.folder}: {name} is missing")
            if weights.shapes[found[name]] != shape:
                raise UserError(
                    f"--from {self.folder}: {name} has shape {weights.shapes[found[name]]}, and by {CONFIG} {shape}"
                )
        if HEAD in found and not torch.equal(weights.read(HEAD), weights.read(found["wte.weight"])):
            raise UserError(f"--from {self.folder}: {HEAD} is not wte.weight: a GPT-2 has one matrix for both")
        for name in found:
            if name not in wanted and name != HEAD and not name.endswith(BUFFERS):
                raise UserError(f"--from {self.folder}: it has {name}, which a GPT-2 has not")

    def parameters(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        shape = self.plan.shape
        pair_of: dict[str, Pair] = {name: pair for pair in pairs(shape) for name in pair.ours}
        with Weights(self.folder) as weights:
            stored = {name.removeprefix(PREFIX): name for name in weights.shapes}
            for name in our_names(shape) if names is None else names:
                pair = pair_of[name]
                yield name, dict(from_gpt2(shape, pair, weights.read(stored[pair.theirs]).float()))[name]

    def model(self) -> GPT:
        return filled(self.plan, self.step, self.parameters())
