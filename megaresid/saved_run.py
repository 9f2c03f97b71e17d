"""A finished or running run, read back without DeepSpeed's engine."""

from pathlib import Path

from megaresid.config import RunConfig, from_flat
from megaresid.errors import UserError
from megaresid.model.gpt import GPT, canonical_parameters, set_step
from megaresid.training.checkpoint import find_checkpoint, read_parameters
from megaresid.training.checkpoint_format import SavedState
from megaresid.training.run_dir import read_json


def run_of(path: Path) -> Path:
    """The run directory of a run, its folder of checkpoints or one of them. Raises UserError for anything else."""
    place = path.resolve()  # a relative path may have too few parents
    for folder in (place, *place.parents[:2]):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path}: neither a run directory nor a checkpoint in one: there is no config.json")


def load_config(run: Path) -> RunConfig:
    values = read_json(run, "config.json")
    values.pop("schema", None)
    return from_flat(values, str(run / "config.json"))


def load_model(path: Path) -> GPT:
    """The model of a run directory or checkpoint at its step, fp32 on the CPU, in evaluation mode. Raises UserError."""
    config = load_config(run_of(path))
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path}: there is no complete checkpoint yet")
    model = GPT(config.plan())
    saved = read_parameters(checkpoint)
    for name, parameter in canonical_parameters(model, model.prefixes).items():
        parameter.data.copy_(saved[name])
    with SavedState(checkpoint) as state:
        set_step(model, state.header.step)
    return model.eval()
