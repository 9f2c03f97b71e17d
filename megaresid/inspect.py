"""Look into a trained model over its depth: ``python -m megaresid.inspect --run runs/first``"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.errors import UserError, exits_with_user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from megaresid.data.mixture import RunData
    from megaresid.monitoring.findings import Findings
    from megaresid.saved_run import Saved

SCHEMA = 1
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]


def inspect(run: Path, step: int | None = None, data: Folder = None, out: Folder = None) -> None:
    """Draw what the stream, the sites and the mixers do over depth, as training does by --diagnose-interval.

    On the same sequences as the training's own, without gradients; no GPU is needed. Writes a PNG and an SVG of each
    figure and findings.json with all numbers, and prints those of the sites.

    Args:
        run: A run directory, a checkpoint in one, or an exported folder.
        step: Of a run directory: the checkpoint of this step, instead of the newest.
        data: The folder of shards to take the sequences from; by default that of the run.
        out: A new folder for what is drawn; by default report/inspect/step_… beside the model.
    """
    choose_accelerator()
    from megaresid.saved_run import open_saved
    from megaresid.training.checkpoint_format import step_dir

    saved = open_saved(run if step is None else _checkpoint(run, step))
    folder = out or saved.folder / "report" / "inspect" / step_dir(saved.step)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: it is there already: give a new folder, or take it away")
    tokens = _tokens(saved, data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        findings = _probe(saved, tokens)
        _write(saved, tokens, findings, folder)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror or error}") from None
    print("\n".join(_table(findings)))
    print(f"step {saved.step} of {saved.weights}; drawn in {folder}", flush=True)


def _checkpoint(run: Path, step: int) -> Path:
    from megaresid.saved_run import run_of
    from megaresid.training.checkpoint_format import FOLDER, checkpoints_in, step_dir

    kept = checkpoints_in(run_of(run) / FOLDER)
    found = [path for path in kept if path.name == step_dir(step)]
    if not found:
        steps = ", ".join(str(int(path.name.removeprefix("step_"))) for path in kept)
        raise UserError(f"--step {step}: {run} has no checkpoint of it; there are those of steps {steps or '(none)'}")
    return found[0]


def _tokens(saved: "Saved", data: Path | None) -> "Tensor":
    """int64 [m, context]: those that the run's own diagnostics have looked at."""
    from megaresid.training.diagnostics import probe_tokens

    if data is None and saved.config is None:
        raise UserError(f"--run {saved.folder}: an exported model is without data: give a folder of shards by --data")
    return probe_tokens(_data(saved, data), saved.plan.shape)


def _data(saved: "Saved", data: Path | None) -> "RunData":
    from megaresid.data.mixture import open_data
    from megaresid.evaluation.chosen import VALIDATION, parse
    from megaresid.training.run_dir import read_json

    size = saved.plan.shape.vocab_size
    if data is not None:
        return open_data([data], vocab_size=size, validating=False)
    options, tree = saved.config.run, read_json(saved.folder, "data.json")
    # Absolute, unlike those in config.json.
    try:
        folders = [Path(entry["folder"]) for entry in tree.get("folders", [tree])]
    except (KeyError, TypeError):
        raise UserError(f"{saved.folder / 'data.json'} is damaged: give a folder of shards by --data") from None
    how = options.data_weights, options.data_order, options.align_documents
    validating = any(VALIDATION in entry.names for entry in parse(saved.config.evaluation.eval))
    found = open_data(folders, *how, vocab_size=size, validating=validating)
    if found.identity != saved.data:
        raise UserError(
            f"{', '.join(map(str, folders))} holds other data than {saved.folder} was trained on: put the old data "
            "back, or give another folder by --data"
        )
    return found


def _probe(saved: "Saved", tokens: "Tensor") -> "Findings":
    """In the run's precision, on a GPU where there is one."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from megaresid.attention.kernels.self_check import check_kernels
    from megaresid.monitoring.probe import probe
    from megaresid.users_code import mistakes_told

    device = torch.device(get_accelerator().current_device_name())
    check_kernels(saved.plan.kinds(), device, saved.dtype or torch.float32)
    with mistakes_told(), torch.autocast(device.type, saved.dtype, enabled=saved.dtype is not None):
        return probe(saved.model().to(device), tokens.to(device))


def _write(saved: "Saved", tokens: "Tensor", findings: "Findings", folder: Path) -> None:
    """The findings go last: where they are, all of the folder is."""
    from megaresid.monitoring.figures import figures
    from megaresid.training.run_dir import write_json

    for name, figure in figures(findings, f"{saved.folder.resolve().name}, step {saved.step}"):
        for ending in ("png", "svg"):
            figure.savefig(folder / f"{name}.{ending}")
    tree = {"schema": SCHEMA, "step": saved.step, "source": saved.source, "spec": saved.plan.hash}
    tree |= {"sequences": len(tokens), "context": tokens.shape[1]}
    tree |= {"dtype": str(saved.dtype or "float32").removeprefix("torch.")}
    write_json(folder / "findings.json", tree | findings.tree())


def _table(findings: "Findings") -> list[str]:
    """A line for each place: the numbers that every variant has."""
    from megaresid.monitoring.findings import CLOSE

    columns = ("read_rms", "update_rms", "update_ratio", "cosine")
    found = {name: findings.by_depth.get(name, {}) for name in columns}
    lines = [f"{'place':16}" + "".join(f"{name:>14}" for name in columns)]
    firsts = set()
    for place in found["read_rms"]:
        layer = place.split(".")[0]
        # A layer's cosine stands with its first site.
        values = [found[name].get(place) for name in columns[:-1]]
        values.append(None if layer in firsts or place == CLOSE else found["cosine"].get(layer))
        firsts.add(layer)
        lines.append(f"{place:16}" + "".join(f"{'' if value is None else f'{value:.4g}':>14}" for value in values))
    lines += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in findings.of_model.items()]
    return lines


@exits_with_user_errors
def main() -> None:
    tyro.cli(inspect, prog="python -m megaresid.inspect")


if __name__ == "__main__":
    main()
