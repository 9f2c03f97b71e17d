"""A finished or running run, or an exported model, read back without DeepSpeed's engine."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megaresid.config import RunConfig, from_flat
from megaresid.errors import UserError, suggestion
from megaresid.exchange.folder import open_folder
from megaresid.exchange.restore import check_fit, filled
from megaresid.model.gpt import GPT
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS
from megaresid.training.checkpoint import find_checkpoint, iterate_parameters
from megaresid.training.checkpoint_format import Header, SavedState
from megaresid.training.run_dir import SCHEMA, read_json
from megaresid.users_code import mistakes_told, none_from


class Saved(Protocol):
    """A model on disk: what it is, and its parameters when they are asked for.

    ``dtype`` is what the run's matrix products ran in, None where that was fp32. ``folder`` is where reports about
    the model go; ``weights`` is where they are: the checkpoint, or the exported folder. ``source`` names what the model
    was made of, without a path, which means nothing elsewhere. ``data`` is the identity of the data set that it was
    trained on, None where it is not known.
    """

    plan: ModelPlan
    step: int
    dtype: torch.dtype | None
    config: RunConfig | None
    folder: Path
    weights: Path
    source: str
    data: str | None

    def parameters(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, full fp32 tensor on the CPU) one by one, of all or of ``names`` in their order. Raises
        UserError where a file is missing or damaged: every file's hash is checked first."""

    def model(self) -> GPT:
        """fp32 on the CPU, in evaluation mode. Raises UserError as ``parameters`` does."""


@dataclass(frozen=True)
class SavedRun:
    """A ``Saved`` that is a checkpoint in a run directory."""

    plan: ModelPlan
    step: int
    dtype: torch.dtype | None
    config: RunConfig
    folder: Path
    weights: Path
    data: str | None

    @property
    def source(self) -> str:
        return f"{self.folder.name}/{self.weights.name}"

    def parameters(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        return iterate_parameters(self.weights, names)

    def model(self) -> GPT:
        return filled(self.plan, self.step, self.parameters())


def open_saved(path: Path) -> Saved:
    """What is at a run directory (its newest complete checkpoint), a checkpoint in one, or an exported folder.

    Raises UserError for anything else, for a run without a complete checkpoint, and for one that this version cannot
    read: its schema, its configuration, its layer specs or its parameters are others. Reads no parameter.
    """
    if (folder := open_folder(path)) is not None:
        return folder
    run = run_of(path)
    config = load_config(run)
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path}: there is no complete checkpoint yet")
    with SavedState(checkpoint) as state:
        header = state.header
    plan = _plan_of(run, config, header)
    check_fit(plan, header.parameters, str(checkpoint))
    data = header.identity.get("data")
    return SavedRun(plan, header.step, _product_dtype(run), config, run, checkpoint, data)


def load_model(path: Path) -> GPT:
    """The model of a run directory, checkpoint or exported folder, fp32 on the CPU, in evaluation mode. Raises
    UserError as ``open_saved`` does, and for damaged parameters."""
    return open_saved(path).model()


def run_of(path: Path) -> Path:
    """The run directory of a run, its folder of checkpoints or one of them. Raises UserError for anything else."""
    place = path.resolve()  # a relative path may have too few parents
    for folder in (place, *place.parents[:2]):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path}: neither a run directory, nor a checkpoint in one, nor an exported model")


def load_config(run: Path) -> RunConfig:
    """The configuration of a run directory; raises UserError where this version cannot read it."""
    values = _object(run, "config.json")
    if "model_type" in values:
        raise UserError(f"{run}: a model in Hugging Face's form: make it ours by python -m megaresid.import_gpt2")
    if (schema := values.pop("schema", None)) != SCHEMA:
        raise UserError(
            f"{run / 'config.json'}: its schema is {schema}, and this version of megaresid reads {SCHEMA}: use the "
            "version that wrote it"
        )
    return from_flat(values, str(run / "config.json"))


def _plan_of(run: Path, config: RunConfig, header: Header) -> ModelPlan:
    source, preset = run / "config.json", config.model.model
    if preset not in PRESETS:
        raise UserError(f"{source}: model={preset!r} is not known: {suggestion(preset, PRESETS)}")
    try:
        with none_from(run), mistakes_told():
            plan = config.plan()
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if header.identity.get("spec", plan.hash) != plan.hash:
        raise UserError(
            f"{source}: its model is not the one that was saved (spec {plan.hash[:12]}, the checkpoint's is "
            f"{str(header.identity['spec'])[:12]}): use the version of megaresid and of your own modules that trained it"
        )
    return plan


def _product_dtype(run: Path) -> torch.dtype | None:
    """As ``DeepSpeedConfig.autocast_dtype``, of a run's resolved JSON."""
    if not (run / "ds_config.json").is_file():
        return None
    sections = (_object(run, "ds_config.json").get(name) for name in ("torch_autocast", "bf16"))
    enabled = any(isinstance(section, dict) and section.get("enabled") for section in sections)
    return torch.bfloat16 if enabled else None


def _object(run: Path, name: str) -> dict[str, Any]:
    values = read_json(run, name)
    if not isinstance(values, dict):
        raise UserError(f"{run / name} is damaged: it is no object of keys and values")
    return values
