"""Measure a trained model: ``python -m megaresid.evaluate --run runs/first --tasks "validation arc_easy,piqa"``"""

import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.errors import UserError, exits_with_user_errors

if TYPE_CHECKING:
    from megaresid.evaluation.hook import Measurable, Measure
    from megaresid.saved_run import Saved

DEFAULT = ("validation", "wikitext2", "lambada", "arc_easy", "hellaswag", "piqa", "winogrande")
SEQUENCES = 16
"""Per forward, where a run does not say what its micro-batch was."""
HEADER = ("name", "number", "value", "stderr", "items", "seconds")


def evaluate(
    run: Path,
    tasks: str | None = None,
    eval_data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    limit: int | None = None,
) -> None:
    """Measure a model as --eval does in training, print the numbers and add them to report/eval.json.

    One process, or as many ranks as a launcher starts, which share the work: deepspeed --module megaresid.evaluate …,
    or torchrun --nproc-per-node=2 -m -- megaresid.evaluate …
    What was measured of the same step under the same name and limit is replaced. What fails is told at the end, when
    all else is measured.

    Args:
        run: A run directory, a checkpoint in one, or an exported folder.
        tasks: Names as in --eval, without @: validation, wikitext2, lambada, module:function, tasks of
            lm-evaluation-harness. By default the first three (an exported folder has no validation data), arc_easy,
            hellaswag, piqa and winogrande.
        eval_data: Read tasks' files here, instead of from the Hugging Face Hub.
        limit: Items of each task of lm-evaluation-harness, for a first look; all by default.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: must be at least 1")
    choose_accelerator()
    import torch.distributed as dist

    from megaresid.evaluation import report
    from megaresid.evaluation.hook import Hook
    from megaresid.evaluation.running import Hooks
    from megaresid.saved_run import open_saved
    from megaresid.training import compiled_ops
    from megaresid.training.engine import start_process_group

    saved = open_saved(run)
    measures = _measures(saved, _names(tasks, saved), eval_data, limit)
    report.read(saved.folder / "report")
    compiled_ops.remove_stale_locks(compiled_ops.use_environment_folder())
    start_process_group()
    model = _loaded(saved)
    first = dist.get_rank() == 0
    hooks = Hooks([Hook(name, None, measure) for name, measure in measures.items()])
    rows, failures = [HEADER], []
    for hook in hooks.due(saved.step, saved.step):
        numbers, failure = hooks.run(hook, model, _say if first else lambda _: None)
        if failure is not None:
            failures.append(f"{hook.name}: {failure}")
        elif first:
            seconds = numbers.pop(f"seconds/{hook.name}")
            found = _measurement(saved, model, hook.name, hook.measure, numbers, limit, eval_data, seconds)
            if report.add(saved.folder / "report", found):
                _say(f"{hook.name}: replaces what was measured before of step {saved.step}")
            rows += _rows(found)
    if first and len(rows) > 1:
        print(report.table(rows))
        print(f"step {saved.step} of {saved.weights}; written to {saved.folder / 'report' / report.NAME}", flush=True)
    dist.barrier()
    if failures:
        raise UserError(f"not measured: {'; '.join(failures)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _names(tasks: str | None, saved: "Saved") -> list[str]:
    from megaresid.evaluation.chosen import VALIDATION, check_names

    if tasks is None:
        return [name for name in DEFAULT if name != VALIDATION or saved.config is not None]
    names = tasks.replace(",", " ").split()
    if not names:
        raise UserError(f"--tasks {tasks!r}: name at least one, such as {DEFAULT[3]}")
    for name in names:
        if "@" in name:
            raise UserError(f"--tasks {name}: there are no steps to measure at: leave {name[name.index('@') :]} away")
    check_names(names, "--tasks")
    return names


def _measures(saved: "Saved", names: list[str], data: Path | None, limit: int | None) -> "dict[str, Measure]":
    """The measure of each name, its data read and checked. Raises UserError."""
    from megaresid.evaluation.chosen import measures, reads_text

    if texts := [name for name in names if reads_text(name)]:
        from data_prep.tokenizer import VOCAB_SIZE

        if (size := saved.plan.shape.vocab_size) != VOCAB_SIZE:
            raise UserError(
                f"--tasks {texts[0]}: its text is encoded by GPT-2's tokenizer, of {VOCAB_SIZE} ids, and the model of "
                f"{saved.weights} predicts {size}: leave it out"
            )
    # One at a time, so that each has its own seconds.
    return {name: measures([name], data, lambda: _validation(saved), limit, "--tasks")[name] for name in names}


def _validation(saved: "Saved") -> "Measure":
    """The validation of a run's training, on the same tokens."""
    from megaresid.data.mixture import open_data
    from megaresid.evaluation.validation import validation_of
    from megaresid.training.run_dir import read_json

    if saved.config is None:
        raise UserError(
            f"--tasks validation: {saved.folder} is an exported model, without the data that it was trained on: name "
            "its run, or leave validation out"
        )
    options, tree = saved.config.run, read_json(saved.folder, "data.json")
    # Absolute, unlike those in config.json. Runs from before folders were blended name theirs in the tree itself.
    folders = [Path(entry["folder"]) for entry in tree.get("folders", [tree])]
    shape = saved.plan.shape
    data = open_data(
        folders,
        options.data_weights,
        options.data_order,
        options.align_documents,
        vocab_size=shape.vocab_size,
        validating=True,
    )
    if data.identity != saved.data:
        raise UserError(
            f"--tasks validation: {', '.join(map(str, folders))} holds other data than {saved.folder} was trained on: "
            "put the old data back, or leave validation out"
        )
    return validation_of(data, shape, saved.config.evaluation.validation_tokens)


def _loaded(saved: "Saved") -> "Measurable":
    """The whole model on this rank's device, in the run's precision (on a CPU too)."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from megaresid.attention.kernels.self_check import check_kernels
    from megaresid.evaluation.loaded import LoadedModel

    device = torch.device(get_accelerator().current_device_name())
    check_kernels(saved.plan.kinds(), device, saved.dtype or torch.float32)
    sequences = (saved.config.batch.micro_batch_size if saved.config else None) or SEQUENCES
    return LoadedModel(saved.model(), device, saved.dtype, sequences * saved.plan.shape.context)


def _measurement(
    saved: "Saved",
    model: "Measurable",
    name: str,
    measure: "Measure",
    numbers: dict[str, float],
    limit: int | None,
    eval_data: Path | None,
    seconds: float,
) -> dict[str, Any]:
    """What ``report/eval.json`` says of one measure."""
    import torch.distributed as dist

    from megaresid.evaluation import report
    from megaresid.evaluation.tasks import Tasks

    of_harness = isinstance(measure, Tasks)
    return {
        "name": name,
        "step": saved.step,
        "limit": limit if of_harness else None,
        "metrics": report.metrics_of(numbers),
        "items": measure.items if of_harness else None,
        "seconds": round(seconds, 3),
        "files": {path.name: report.sha256(path) for path in _files(name, measure, eval_data)},
        "spec": saved.plan.hash,
        "data": saved.data,
        "weights": str(saved.weights.resolve()),
        "dtype": str(saved.dtype or "float32").removeprefix("torch."),
        "device": model.device.type,
        "ranks": dist.get_world_size(),
        "versions": {package: _version(package) for package in ("megaresid", "torch", "lm_eval")},
        "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _files(name: str, measure: "Measure", eval_data: Path | None) -> list[Path]:
    """The files of --eval-data that a measure has read."""
    from megaresid.evaluation.data import WIKITEXT2, find
    from megaresid.evaluation.tasks import Tasks

    if isinstance(measure, Tasks):
        return list(measure.files.values())
    read = {"wikitext2": WIKITEXT2, "lambada": "lambada_test.jsonl"}
    return [find(eval_data, read[name])] if eval_data and name in read else []


def _rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of one measurement, for the table; its items and seconds stand in the first."""
    once = (str(sum(found["items"].values())) if found["items"] else "", f"{found['seconds']:.1f}")
    rows = []
    for number, given in found["metrics"].items():
        name, metric = number.split("/", 1) if "/" in number else (found["name"], number)
        rows.append((name, metric, _shown(given["value"]), _shown(given.get("stderr"), ""), *once))
        once = ("", "")
    return rows


def _shown(value: float | None, missing: str = "not finite") -> str:
    return missing if value is None else f"{value:.4f}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@exits_with_user_errors
def main() -> None:
    # What the deepspeed launcher adds is in the environment too.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    tyro.cli(evaluate, prog="python -m megaresid.evaluate", args=arguments)
    import torch.distributed as dist

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
