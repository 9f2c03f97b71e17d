"""A checked run, carried out: join the ranks, build, restore, train."""

from pathlib import Path

import torch
import torch.distributed
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from megaresid.data.loader import Loader
from megaresid.data.sampler import Sampler, windows
from megaresid.data.shards import TokenStream
from megaresid.errors import UserError
from megaresid.evaluation.hook import Hook
from megaresid.evaluation.validation import Validation
from megaresid.model.count import parameters_by_component
from megaresid.model.flops import peak_flops, training_flops_per_token
from megaresid.monitoring.metrics import Recorder
from megaresid.training import compiled_ops
from megaresid.training.checkpoint import copy_parameters, load_checkpoint, read_parameters, save_checkpoint
from megaresid.training.engine import Engine, start_process_group
from megaresid.training.loop import Course, train
from megaresid.training.prepare import Prepared
from megaresid.training.run_dir import RunDirectory, environment
from megaresid.training.schedule import learning_rate


def execute(prepared: Prepared) -> None:
    """Join the ranks, build, restore if asked, train. Called by every rank."""
    config, plan, batch = prepared.config, prepared.plan, prepared.batch
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
    with loader, recorder or _Nothing():
        train(engine, iter(loader), course, config.interval, _hooks(prepared, rank), save, recorder)
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
        f"data      {len(prepared.training):,} training and {_length(prepared.validation):,} validation tokens, "
        f"identity {prepared.manifest.identity[:12]}"
    )
    start = f"step {course.first} of {prepared.resume}" if prepared.resume else prepared.weights or "new weights"
    recorder.say(f"start     {start}, {course.steps:,} steps in {prepared.config.run.run_dir}")


def _hooks(prepared: Prepared, rank: int) -> list[Hook]:
    if prepared.validation is None:
        return []
    interval, shape = prepared.config.interval, prepared.plan.shape
    validation = Validation(
        prepared.validation,
        context=shape.context,
        tokens=interval.validation_tokens,
        micro_batch=prepared.batch.micro,
        rank=rank,
        ranks=prepared.batch.ranks,
        vocab_size=shape.vocab_size,
    )
    return [Hook("validation", interval.validation_interval, validation)]


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
    return load_checkpoint(engine.deepspeed, engine.parameters, prepared.resume).step


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
            "validation_tokens": _length(prepared.validation),
        },
    )


def _length(stream: TokenStream | None) -> int:
    return 0 if stream is None else len(stream)
