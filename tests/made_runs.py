"""Run directories without a training: a model away from initialisation, and a checkpoint as ranks write it."""

from pathlib import Path

import torch
from small_models import move_away

from megaresid.config import RunConfig, from_flat
from megaresid.model.gpt import GPT, build, canonical_parameters, set_step
from megaresid.training.checkpoint_format import (
    FileRecord,
    Header,
    Marker,
    fill,
    layout_of,
    rank_file,
    step_dir,
    write_elements,
    write_record,
)
from megaresid.training.run_dir import write_json

SIZES = {"model": "tiny", "layers": 2, "heads": 2, "width": 16, "context": 12}
DATA = "0123456789abcdef"


def configuration(**options) -> RunConfig:
    return from_flat(SIZES | options, "test")


def model_of(config: RunConfig, step: int = 0, away: float = 0.2) -> GPT:
    """With every parameter away from its start, fp32, in evaluation mode."""
    model = build(config.plan(), seed=0)
    move_away(canonical_parameters(model, model.prefixes), away, config.shape.vocab_size)
    set_step(model, step)
    return model.eval()


def made_run(
    run: Path, config: RunConfig | None = None, step: int = 3, ranks: int = 2, identity: dict | None = None
) -> GPT:
    """Write a run directory, and return the model that its one checkpoint holds: every rank has a part of each of its
    parameters, and an optimizer's state beside it."""
    config = config or configuration()
    model = model_of(config, step)
    folder = run / "checkpoints" / step_dir(step)
    folder.mkdir(parents=True)
    write_json(run / "config.json", {"schema": 1, **config.flat()})
    parameters = canonical_parameters(model, model.prefixes)
    records = {}
    for rank in range(ranks):
        tensors, runs = {}, {}
        for name, parameter in parameters.items():
            flat = parameter.detach().flatten()
            begin, end = (flat.numel() * part // ranks for part in (rank, rank + 1))
            tensors["parameter", name], runs[name] = flat[begin:end].clone(), (begin, end - begin)
            tensors["exp_avg", name] = torch.ones(end - begin)
        records[rank_file(rank)] = write_tensors(folder / rank_file(rank), tensors, runs)
    header = Header(
        step=step,
        world_size=ranks,
        parameters={name: list(parameter.shape) for name, parameter in parameters.items()},
        scalars={},
        counters={},
        engine={},
        generators=[{}] * ranks,
        identity={"data": DATA, "spec": model.plan.hash} if identity is None else identity,
    )
    records["checkpoint.json"] = write_record(folder / "checkpoint.json", header)
    write_record(folder / "complete.json", Marker(files=records))
    return model


def write_tensors(path: Path, tensors: dict, runs: dict) -> FileRecord:
    """A rank's file, of flat tensors by (kind, name)."""
    layout = layout_of(tensors, runs)
    elements = torch.empty(layout.size, dtype=torch.uint8)
    fill(elements, layout, tensors)
    return write_elements(path, layout, elements)


def same_parameters(model: GPT, other: GPT) -> bool:
    """Whether all have the same names, in the same order, and the same bits."""
    ours, theirs = (canonical_parameters(each, each.prefixes) for each in (model, other))
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
