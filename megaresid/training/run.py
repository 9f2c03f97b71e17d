"""A checked run, carried out: join the ranks, build, restore, train."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from megaresid.attention.kernels.self_check import self_check
from megaresid.data.loader import Loader
from megaresid.errors import UserError
from megaresid.exchange.folder import is_folder
from megaresid.exchange.into_engine import copy_exported
from megaresid.model.count import parameters_by_component
from megaresid.model.flops import peak_flops, training_flops_per_token
from megaresid.model.init import derived_seed
from megaresid.model.pipeline import describe_stages
from megaresid.monitoring.metrics import Recorder
from megaresid.training import compiled_ops
from megaresid.training.checkpoint import copy_parameters, load_checkpoint, load_newest
from megaresid.training.diagnostics import Diagnostics, probe_tokens
from megaresid.training.engine import Engine, start_process_group
from megaresid.training.forensics import Forensics
from megaresid.training.health import Health
from megaresid.training.identity import describe
from megaresid.training.initial import data_order
from megaresid.training.loop import Course, Outcome, train
from megaresid.training.pipeline_engine import PipelineEngine
from megaresid.training.prepare import Prepared
from megaresid.training.retention import Retention
from megaresid.training.rollback import Back, Rollbacks
from megaresid.training.run_dir import OUTCOME, RunDirectory, environment, read_metrics
from megaresid.training.saver import Saver
from megaresid.training.schedule import learning_rate
from megaresid.training.signals import Wishes
from megaresid.training.supervisor import Report
from megaresid.training.trace import Trace
from megaresid.training.watchdog import Watchdog

T = TypeVar("T")


def execute(prepared: Prepared, wishes: Wishes, report: Report) -> Outcome:
    """Join the ranks, build, restore if asked, train; how it ended. Called by every rank."""
    compiled_ops.remove_stale_locks(compiled_ops.use_environment_folder())
    start_process_group()
    run_dir, patience = prepared.config.run.run_dir, prepared.config.execution.hang_timeout
    directory = _on_rank_0(lambda: RunDirectory(run_dir))
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with Watchdog(run_dir, rank, ranks, patience, report) as watchdog:
        outcome = _carry_out(prepared, directory, wishes, watchdog)
    torch.distributed.destroy_process_group()
    return outcome


def _carry_out(
    prepared: Prepared, directory: RunDirectory | None, wishes: Wishes, watchdog: Watchdog
) -> Outcome:
    """Build, restore if asked, train, and go back and train again where that is due."""
    config, plan, batch = prepared.config, prepared.plan, prepared.batch
    rank = torch.distributed.get_rank()
    make_engine = PipelineEngine if config.execution.pipeline_stages > 1 else Engine
    engine = make_engine(plan, config, prepared.ds_config, batch)
    watchdog.follow(engine)
    torch.manual_seed(derived_seed(config.run.seed, f"dropout of rank {rank}"))
    first, counters, resumed = _restore(engine, prepared)
    prepared = dataclasses.replace(prepared, resume=resumed)
    rollbacks = Rollbacks(config.run.run_dir)
    outcome = _train(engine, prepared, directory, first, counters, rollbacks, wishes, watchdog)
    while isinstance(outcome, Back):
        state, loaded, damaged = load_newest(engine.deepspeed, engine.parameters, outcome.checkpoint)
        _tell_damaged(damaged, loaded)
        counters = state.counters | {"skipped_batches": outcome.skipped_batches + outcome.step - state.step}
        outcome = _train(engine, prepared, directory, state.step, counters, rollbacks, wishes, watchdog)
    torch.distributed.barrier()
    engine.deepspeed.destroy()
    return outcome


def _train(
    engine: Engine,
    prepared: Prepared,
    directory: RunDirectory | None,
    first: int,
    counters: dict[str, Any],
    rollbacks: Rollbacks,
    wishes: Wishes,
    watchdog: Watchdog,
) -> Outcome | Back:
    """From step ``first``, whose state the engine has and whose counters these are, to the end, or to where the run
    ends before or goes back."""
    config, plan, batch = prepared.config, prepared.plan, prepared.batch
    rank, shape = torch.distributed.get_rank(), plan.shape
    peak = None
    if engine.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(engine.device), prepared.ds_config.autocast_dtype)
    course = Course(
        first=first,
        training_seconds=counters.get("training_seconds", 0.0),
        skipped_steps=counters.get("skipped_steps", 0),
        steps=config.run.steps,
        tokens_per_step=batch.sequences * shape.context,
        learning_rate=lambda step: learning_rate(step, config.run.steps, config.optimizer),
        flops_per_token=training_flops_per_token(plan),
        peak_flops=peak * torch.distributed.get_world_size() if peak else None,
        pending=_pending(prepared, first),
        skipped_batches=counters.get("skipped_batches", 0),
    )
    health = Health(config.health, counters.get("health"))
    recorder = _on_rank_0(lambda: _start_record(directory, prepared, course, engine.device))
    if first == 0:
        _record_start(engine, prepared, directory)
    saver = Saver(
        engine.deepspeed,
        engine.parameters,
        config.run.run_dir / "checkpoints",
        identity=prepared.identity,
        retention=Retention(config.interval.keep_checkpoints, config.interval.keep_every),
        recorder=recorder,
        failed=counters.get("failed_saves", 0),
    )
    trace = Trace(rank, first, batch.accumulation)
    loader = Loader(
        prepared.data.training(shape.context),
        trace.sampler(prepared.data.sampler(shape.context, config.run.seed)),
        context=shape.context,
        global_batch=batch.sequences,
        micro_batch=batch.micro,
        ranks=batch.ranks,
        rank=engine.data_rank,
        vocab_size=shape.vocab_size,
        first_step=first + course.skipped_batches,
        last_step=config.run.steps + course.skipped_batches,
        pin=engine.device.type == "cuda",
    )
    diagnostics = _diagnostics(engine, prepared, recorder)
    with recorder or nullcontext(), saver, loader:
        outcome = train(
            engine,
            watchdog.each(trace.batches(iter(loader))),
            course,
            config.interval,
            prepared.hooks,
            watchdog.followed(saver.save, "saving"),
            recorder,
            config.evaluation.eval_strict,
            tell_saves=saver.tell,
            health=health,
            forensics=Forensics(config.run.run_dir, course.skipped_batches),
            wishes=wishes,
            diagnostics=diagnostics,
        )
        saved = watchdog.followed(saver.saved, "saving")()
        if outcome in (Outcome.ROLL_BACK, Outcome.UNHEALTHY):
            outcome, line = rollbacks.decide(outcome is Outcome.ROLL_BACK, health, course.skipped_batches)
            if recorder:
                recorder.say(line)
        elif not saved:
            outcome = Outcome.UNSAVED
        if directory and isinstance(outcome, Outcome):
            _record_end(directory, outcome, health.verdict.step if health.verdict else first, recorder.say)
    return outcome


def _record_end(directory: RunDirectory, outcome: Outcome, step: int, say: Callable[[str], None]) -> None:
    try:
        directory.write(OUTCOME, {"outcome": outcome.value, "step": step})
    except OSError as error:
        say(f"{OUTCOME} cannot be written ({error.strerror or error}): how the run ended is not recorded")


def _diagnostics(engine: Engine, prepared: Prepared, recorder: Recorder | None) -> Diagnostics | None:
    """None where they are off, as in a pipeline, whose stages have no model to look at."""
    config = prepared.config
    if not config.interval.diagnose_interval:
        return None
    if config.execution.pipeline_stages > 1:
        if recorder:
            recorder.say("diagnose  not in a pipeline: python -m megaresid.inspect looks at its checkpoints")
        return None
    tokens = [_on_rank_0(lambda: probe_tokens(prepared.data, prepared.plan.shape))]
    torch.distributed.broadcast_object_list(tokens, src=0)
    return Diagnostics(engine, tokens[0], config.interval.diagnose_interval, recorder)


def _on_rank_0(make: Callable[[], T]) -> T | None:
    """What ``make`` makes on rank 0, None elsewhere. Where it fails there, no rank is left waiting for it."""
    made, failure = None, None
    if torch.distributed.get_rank() == 0:
        try:
            made = make()
        except Exception as error:
            failure = UserError(f"{error.filename}: {error.strerror}") if isinstance(error, OSError) else error
    problem = [None if failure is None else str(failure)]
    torch.distributed.broadcast_object_list(problem, src=0)
    if failure is not None:
        raise failure
    if problem[0] is not None:
        raise UserError(problem[0])
    return made


def _restore(engine: Engine, prepared: Prepared) -> tuple[int, dict[str, Any], Path | None]:
    """Load what was asked for; the step to go on from, the counters at that step and the checkpoint it is.

    Every rank loads what rank 0 found: on a shared disk a listing can be older on one machine than on another.
    """
    found = [(prepared.resume, prepared.weights)]
    torch.distributed.broadcast_object_list(found, src=0)
    resume, weights = found[0]
    if weights:
        copy = copy_exported if is_folder(weights) else copy_parameters
        copy(engine.deepspeed, engine.parameters, weights)
    if not resume:
        return 0, {}, None
    if prepared.config.run.resume == "auto":
        state, resume, damaged = load_newest(engine.deepspeed, engine.parameters, resume)
        _tell_damaged(damaged, resume)
    else:
        state = load_checkpoint(engine.deepspeed, engine.parameters, resume)
    return state.step, state.counters, resume


def _tell_damaged(damaged: Iterable[str], loaded: Path) -> None:
    for problem in damaged if torch.distributed.get_rank() == 0 else ():
        sys.stderr.write(f"warning: {problem}; going on from {loaded.name}\n")


def _record_start(engine: Engine, prepared: Prepared, directory: RunDirectory | None) -> None:
    """Write the digests of what the run starts from, which a pipeline's stages have in parts. Called by every rank."""
    stages = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(stages, engine.starts)
    if directory:
        starts = {name: start for stage in stages for name, start in stage.items()}
        shape, run = prepared.plan.shape, prepared.config.run
        order = data_order(prepared.data, shape.context, prepared.batch.sequences, run.seed)
        weights = str(prepared.weights) if prepared.weights else None
        directory.write("initial.json", {"order": order, "weights_from": weights, "parameters": starts})


def _pending(prepared: Prepared, first: int) -> set[str]:
    """The names of the hooks that have no numbers of step ``first`` in the run directory: all of them in a new run."""
    measured = [set()]
    metrics = prepared.config.run.run_dir / "metrics.jsonl"
    if torch.distributed.get_rank() == 0 and first > 0 and metrics.exists():
        rows = [row for row in read_metrics(metrics.parent) if row["step"] == first]
        measured = [{hook.name for hook in prepared.hooks for row in rows if f"seconds/{hook.name}" in row}]
    torch.distributed.broadcast_object_list(measured, src=0)
    return {hook.name for hook in prepared.hooks} - measured[0]


def _start_record(directory: RunDirectory, prepared: Prepared, course: Course, device: torch.device) -> Recorder:
    """Describe the run in its directory, on the screen and in TensorBoard."""
    # Until the run ends by itself, nothing is said of an earlier end.
    directory.write(OUTCOME, {"outcome": None, "step": course.first})
    directory.keep_metrics_until(course.first)
    _describe(directory, prepared, device)
    monitors = prepared.ds_config.monitors
    monitors = MonitorMaster(get_monitor_config(monitors)) if monitors else None
    recorder = Recorder(directory.path, course.first, course.steps, monitors)
    recorder.describe("spec", f"{prepared.plan.hash}\n\n    {json.dumps(prepared.plan.tree())}")
    _announce(recorder, prepared, course)
    return recorder


def _announce(recorder: Recorder, prepared: Prepared, course: Course) -> None:
    """The lines before the first step: what is trained, on what, and from where."""
    plan, batch, ds = prepared.plan, prepared.batch, prepared.ds_config
    parameters = sum(parameters_by_component(plan).values())
    recorder.say(f"model     {prepared.config.model.model}, {parameters:,} parameters, spec {plan.hash[:12]}")
    recorder.say(f"positions {plan.describe_positions()}")
    recorder.say(f"batch     {batch.describe(plan.shape.context)}")
    recorder.say(
        f"engine    ZeRO {ds.stage}, {ds.engine['optimizer']['type']}, products in {ds.autocast_dtype or 'float32'}, "
        f"{torch.get_num_threads()} threads per rank"
    )
    if (stages := prepared.config.execution.pipeline_stages) > 1:
        for line in describe_stages(plan, stages):
            recorder.say(f"pipeline  {line}")
    for line in prepared.data.describe(batch.sequences * course.steps, plan.shape.context):
        recorder.say(f"data      {line}")
    for change in prepared.changes:
        recorder.say(f"identity  {describe(change)}")
    if prepared.config.execution.compile:
        recorder.say("compile   at the first step, which may take minutes")
    start = f"step {course.first} of {prepared.resume}" if prepared.resume else prepared.weights or "new weights"
    recorder.say(f"start     {start}, {course.steps:,} steps in {prepared.config.run.run_dir}")


def _describe(directory: RunDirectory, prepared: Prepared, device: torch.device) -> None:
    plan, dtype = prepared.plan, prepared.ds_config.product_dtype
    kernels = self_check(plan.kinds(), device, dtype, plan.documents)
    directory.write("config.json", prepared.config.flat())
    directory.write("ds_config.json", prepared.ds_config.engine | prepared.ds_config.monitors)
    cost = {
        "parameters": sum(parameters_by_component(plan).values()),
        "flops_per_token": training_flops_per_token(plan),
    }
    directory.write("spec.json", plan.tree() | {"hash": plan.hash} | cost)
    directory.write("environment.json", environment() | {"kernels": kernels})
    changes = {"changes": [change.model_dump() for change in prepared.changes]} if prepared.changes else {}
    directory.write("data.json", prepared.data.record() | changes)
