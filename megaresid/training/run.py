"""A run from its configuration: check everything first, write nothing until all is well, then train."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from megaresid.config import RunConfig
from megaresid.data.loader import Loader
from megaresid.data.manifest import Manifest, check_vocabulary, load_manifest
from megaresid.data.sampler import Sampler, check_capacity, windows
from megaresid.data.shards import TokenStream
from megaresid.errors import UserError
from megaresid.evaluation.hook import Hook
from megaresid.evaluation.validation import Validation
from megaresid.model.count import parameters_by_component
from megaresid.model.flops import peak_flops, training_flops_per_token
from megaresid.model.plan import ModelPlan
from megaresid.monitoring.metrics import Recorder
from megaresid.training import compiled_ops
from megaresid.training.checkpoint import (
    copy_parameters,
    find_checkpoint,
    load_checkpoint,
    read_parameters,
    save_checkpoint,
)
from megaresid.training.ds_config import Batch, DeepSpeedConfig, plan_batch, resolve
from megaresid.training.engine import Engine, start_process_group
from megaresid.training.loop import Course, train
from megaresid.training.run_dir import RunDirectory, check_usable, environment
from megaresid.training.schedule import learning_rate


@dataclass(frozen=True)
class Prepared:
    """A run whose every input has been checked; nothing has been written and no rank has been joined."""

    config: RunConfig
    plan: ModelPlan
    batch: Batch
    ds_config: DeepSpeedConfig
    manifest: Manifest
    training: TokenStream
    validation: TokenStream
    resume: Path | None
    weights: Path | None

    @property
    def identity(self) -> dict[str, str | int]:
        """What a resumed run must share with the run that it goes on with."""
        return {
            "data": self.manifest.identity,
            "spec": self.plan.hash,
            "global_batch_size": self.batch.sequences,
            "seed": self.config.run.seed,
        }


def prepare(config: RunConfig) -> Prepared:
    """Check a configuration against the files and the launcher's environment; raises UserError."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    run = config.run
    batch = plan_batch(config, ranks)
    ds_config = resolve(run.deepspeed_config, config, batch)
    plan = ModelPlan(config.shape, config.model.attention, config.model.residual)
    manifest = load_manifest(run.data)
    check_vocabulary(manifest, plan.shape.vocab_size)
    training = TokenStream.open(run.data, manifest, "train")
    where = f"data folder {run.data}"
    check_capacity(len(training), context=plan.shape.context, global_batch=batch.sequences, where=where)
    validation = TokenStream.open(run.data, manifest, "val")
    check_usable(run.run_dir, resuming=run.resume is not None)
    return Prepared(
        config=config,
        plan=plan,
        batch=batch,
        ds_config=ds_config,
        manifest=manifest,
        training=training,
        validation=validation,
        resume=_checkpoint_to_resume(run.resume, run.run_dir),
        weights=_required_checkpoint(run.init_from, "--init-from") if run.init_from else None,
    )


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


def execute(prepared: Prepared) -> None:
    """Join the ranks, build, restore if asked, train. Called by every rank."""
    config, plan, batch = prepared.config, prepared.plan, prepared.batch
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        compiled_ops.remove_stale_locks(compiled_ops.use_environment_folder())
    start_process_group()
    rank = torch.distributed.get_rank()
    directory = _agree(lambda: RunDirectory(config.run.run_dir), rank)
    engine = Engine(plan, config, prepared.ds_config, batch)
    torch.manual_seed(config.run.seed * 1_000_003 + rank)  # dropout: one stream a rank
    first = _restore(engine, prepared)
    if rank == 0:
        directory.keep_metrics_until(first)
        _describe(directory, prepared)

    shape = plan.shape
    sampler = Sampler(windows(len(prepared.training), shape.context), config.run.seed)
    validation = Validation(
        prepared.validation,
        context=shape.context,
        tokens=config.interval.validation_tokens,
        micro_batch=batch.micro,
        rank=rank,
        ranks=batch.ranks,
        vocab_size=shape.vocab_size,
    )
    peak = peak_flops(engine.device)
    course = Course(
        first=first,
        steps=config.run.steps,
        tokens_per_step=batch.sequences * shape.context,
        learning_rate=lambda step: learning_rate(step, config.run.steps, config.optimizer),
        flops_per_token=training_flops_per_token(plan),
        peak_flops=peak * batch.ranks if peak else None,
    )

    def save(step: int) -> None:
        save_checkpoint(
            engine.deepspeed,
            engine.parameters,
            config.run.run_dir / "checkpoints",
            step=step,
            counters={"tokens": step * course.tokens_per_step},
            identity=prepared.identity,
            keep=config.interval.keep_checkpoints or None,
        )

    recorder = None
    if rank == 0:
        monitors = MonitorMaster(get_monitor_config(prepared.ds_config.monitors)) if prepared.ds_config.monitors else None
        recorder = Recorder(config.run.run_dir, first, config.run.steps, monitors)
    loader = Loader(
        prepared.training,
        sampler,
        context=shape.context,
        global_batch=batch.sequences,
        micro_batch=batch.micro,
        ranks=batch.ranks,
        rank=rank,
        vocab_size=shape.vocab_size,
        first_step=first,
        last_step=config.run.steps,
        pin=engine.device.type == "cuda",
    )
    if recorder:
        _announce(recorder, prepared, course)
    hooks = [Hook("validation", config.interval.validation_interval, validation)]
    with loader, recorder or _Nothing():
        train(engine, iter(loader), course, config.interval, hooks, save, recorder)
    torch.distributed.barrier()
    engine.deepspeed.destroy()
    torch.distributed.destroy_process_group()


def _announce(recorder: Recorder, prepared: Prepared, course: Course) -> None:
    """The lines before the first step: what is trained, on what, and from where."""
    plan, batch, ds = prepared.plan, prepared.batch, prepared.ds_config
    parameters = sum(parameters_by_component(plan).values())
    recorder.say(f"model     {prepared.config.model.model}, {parameters:,} parameters, spec {plan.hash[:12]}")
    recorder.say(
        f"batch     {batch.micro} sequences x {batch.accumulation} accumulation x {batch.ranks} ranks = "
        f"{course.tokens_per_step:,} tokens per step"
    )
    recorder.say(
        f"engine    ZeRO {ds.stage}, {ds.engine['optimizer']['type']}, products in {ds.autocast_dtype or 'float32'}, "
        f"{torch.get_num_threads()} threads per rank"
    )
    recorder.say(
        f"data      {len(prepared.training):,} training and {len(prepared.validation):,} validation tokens, "
        f"identity {prepared.manifest.identity[:12]}"
    )
    start = f"step {course.first} of {prepared.resume}" if prepared.resume else prepared.weights or "new weights"
    recorder.say(f"start     {start}, {course.steps:,} steps in {prepared.config.run.run_dir}")


class _Nothing:
    """Stands for the recorder on the ranks that have none."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_) -> None: ...


def _agree(make, rank: int):
    """Let rank 0 make something that can fail by the user's mistake, and tell all ranks whether it did."""
    made, problem = None, [None]
    if rank == 0:
        try:
            made = make()
        except UserError as error:
            problem = [str(error)]
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])
    return made


def _restore(engine: Engine, prepared: Prepared) -> int:
    """Load what was asked for; the step to go on from."""
    if prepared.weights:
        copy_parameters(engine.deepspeed, engine.parameters, read_parameters(prepared.weights))
    if not prepared.resume:
        return 0
    state = load_checkpoint(engine.deepspeed, engine.parameters, prepared.resume)
    for key, value in prepared.identity.items():
        if state.identity.get(key) != value:
            raise UserError(
                f"--resume {prepared.resume}: its {key} is {state.identity.get(key)}, this run's is {value}: "
                "resume with what it was started with, or start anew from its weights by --init-from"
            )
    return state.step


def _describe(directory: RunDirectory, prepared: Prepared) -> None:
    directory.write("config.json", prepared.config.flat())
    directory.write("ds_config.json", prepared.ds_config.engine | prepared.ds_config.monitors)
    directory.write("spec.json", prepared.plan.tree() | {"hash": prepared.plan.hash})
    directory.write("environment.json", environment())
    directory.write(
        "data.json",
        {
            "folder": str(prepared.config.run.data.resolve()),
            "identity": prepared.manifest.identity,
            "training_tokens": len(prepared.training),
            "validation_tokens": len(prepared.validation),
        },
    )
