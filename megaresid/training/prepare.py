"""A run from its configuration: everything is checked here, and nothing is written."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from megaresid.attention.kernels.self_check import check_kernels
from megaresid.config import RunConfig
from megaresid.data.mixture import RunData, open_data
from megaresid.errors import UserError
from megaresid.evaluation import chosen
from megaresid.evaluation.hook import Hook
from megaresid.evaluation.validation import validation_of
from megaresid.exchange.folder import is_folder, read_description
from megaresid.model.check import check_states, check_users_mixers, complete_rules
from megaresid.model.flops import forward_flops_per_token
from megaresid.model.gpt import GPT, canonical_name, canonical_parameters
from megaresid.model.pipeline import check_pipeline
from megaresid.model.plan import ModelPlan
from megaresid.training.checkpoint import check_shapes, find_checkpoint
from megaresid.training.checkpoint_format import SavedState
from megaresid.training.ds_config import Batch, DeepSpeedConfig, data_parallel_ranks, plan_batch, resolve
from megaresid.training.identity import HISTORY, Change, Values, check_resumed
from megaresid.training.rules import overridden
from megaresid.training.run_dir import check_usable
from megaresid.users_code import mistakes_told


@dataclass(frozen=True)
class Prepared:
    """A run whose every input has been checked; nothing has been written and no rank has been joined."""

    config: RunConfig
    plan: ModelPlan
    batch: Batch
    ds_config: DeepSpeedConfig
    data: RunData
    resume: Path | None
    weights: Path | None
    hooks: tuple[Hook, ...]
    changes: tuple[Change, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run that it goes on with, and what has been allowed to differ."""
        values: Values = {
            "data": self.data.identity,
            "tokenizer": self.data.folders[0].manifest.content.tokenizer.sha256,
            "spec": self.plan.hash,
            "global_batch_size": self.batch.sequences,
            "seed": self.config.run.seed,
            "optimizer": self.ds_config.engine["optimizer"]["type"],
        }
        return values | ({HISTORY: [change.model_dump() for change in self.changes]} if self.changes else {})


def prepare(config: RunConfig, ranks: int | None = None) -> Prepared:
    """Check a configuration against the files and the launcher's environment, which knows the ranks where they are not
    given; raises UserError."""
    ranks = ranks or int(os.environ.get("WORLD_SIZE", "1"))
    run = config.run
    batch = plan_batch(config, data_parallel_ranks(config, ranks))
    ds_config = resolve(run.deepspeed_config, config, batch)
    with mistakes_told():
        plan = config.plan()
        check_kernels(plan.kinds(), torch.device(get_accelerator().device_name()), ds_config.product_dtype)
        check_states(plan)
        if config.execution.pipeline_stages > 1:
            check_pipeline(plan, config.execution.pipeline_stages)
        check_users_mixers(plan)
        with torch.device("meta"):
            model = GPT(plan)
        _check_rules(model, config, ds_config)
        forward_flops_per_token(plan)
    evaluation = config.evaluation
    entries = chosen.parse(evaluation.eval)
    names = [name for entry in entries for name in entry.names]
    data = open_data(
        run.data,
        run.data_weights,
        run.data_order,
        run.align_documents,
        vocab_size=plan.shape.vocab_size,
        validating=chosen.VALIDATION in names,
    )
    data.check_capacity(plan.shape.context, batch.sequences)
    chosen.check_tokenizer(names, data.folders[0].manifest.content.tokenizer, data.folders[0].path)
    check_usable(run.run_dir, resuming=run.resume is not None)
    resume = _checkpoint_to_resume(run.resume, run.run_dir)
    prepared = Prepared(
        config=config,
        plan=plan,
        batch=batch,
        ds_config=ds_config,
        data=data,
        resume=resume,
        weights=_weights(run.init_from) if run.init_from and not resume else None,
        hooks=chosen.hooks(
            entries,
            evaluation.eval_data,
            lambda: validation_of(data, plan.shape, evaluation.validation_tokens),
        ),
    )
    return replace(prepared, changes=tuple(_check_saved(prepared, model)))


def _check_rules(model: GPT, config: RunConfig, ds_config: DeepSpeedConfig) -> None:
    """Read the user's changes of parameter rules, and refuse to round to bf16 what stays in fp32: parameters whose
    rule says so, and buffers, which hold coefficients too."""
    rules = overridden(complete_rules(model), config.optimizer.parameter_rules)
    if not ds_config.engine.get("bf16", {}).get("enabled"):
        return
    kept = [name for name, rule in rules.items() if rule.fp32]
    kept += [
        canonical_name(path, model.prefixes) for path, buffer in model.named_buffers() if buffer.is_floating_point()
    ]
    if kept:
        raise UserError(
            f"{config.run.deepspeed_config}: bf16.enabled would round {kept[0]} to bf16, and it must stay in fp32 "
            f"(model of residual {config.model.residual!r}, attention {config.model.attention!r}): use torch_autocast "
            "with bfloat16 instead"
        )


def _check_saved(prepared: Prepared, model: GPT) -> list[Change]:
    """Hold the checkpoint to be loaded against this run, from its header alone; the changes that were allowed."""
    path = prepared.resume or prepared.weights
    if path is None:
        return []
    shapes = {name: list(p.shape) for name, p in canonical_parameters(model, model.prefixes).items()}
    if is_folder(path):
        check_shapes(str(path), read_description(path).parameters, shapes)
        return []
    with SavedState(path) as saved:
        header = saved.header
    changes = []
    if prepared.resume:
        changes = check_resumed(
            path,
            saved=header.identity,
            mine=prepared.identity,
            step=header.step,
            config=prepared.config,
            misfit=_misfit(header.parameters, shapes),
        )
        run = prepared.config.run
        newest = find_checkpoint(run.run_dir) if run.run_dir.exists() else None
        if newest and path.resolve() != newest.resolve():
            raise UserError(
                f"--resume {path}: --run-dir {run.run_dir} has gone on to {newest.name} of its own: resume with auto, "
                "or give another --run-dir"
            )
        if header.step > run.steps:
            raise UserError(f"--resume {path}: it is of step {header.step}, past --steps {run.steps}: give more steps")
    check_shapes(str(path), header.parameters, shapes)
    return changes


def _misfit(saved: Mapping[str, list[int]], live: Mapping[str, list[int]]) -> str | None:
    """What ``check_shapes`` says of a checkpoint's parameters; None where they fit."""
    try:
        check_shapes("checkpoint", saved, live)
    except UserError as error:
        return str(error).removeprefix("checkpoint: ")
    return None


def _weights(path: Path) -> Path:
    """An exported folder, or a checkpoint."""
    return path if is_folder(path) else _required_checkpoint(path, "--init-from")


def _checkpoint_to_resume(resume: str | None, run_dir: Path) -> Path | None:
    if resume is None:
        return None
    if resume == "auto":
        return find_checkpoint(run_dir) if run_dir.exists() else None
    return _required_checkpoint(Path(resume), "--resume")


def _required_checkpoint(path: Path, option: str) -> Path:
    found = find_checkpoint(path) if path.exists() else None
    if found is None:
        raise UserError(f"{option} {path}: there is no complete checkpoint: name a run directory or a checkpoint")
    return found
