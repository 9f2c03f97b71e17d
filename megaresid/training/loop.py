"""The training loop: steps, and what happens between them."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from megaresid.config import HealthOptions, IntervalOptions
from megaresid.errors import UserError
from megaresid.evaluation.hook import Hook
from megaresid.evaluation.running import Hooks
from megaresid.monitoring.metrics import Recorder, peak_memory_bytes
from megaresid.training.diagnostics import Diagnostics
from megaresid.training.engine import Engine, StepResult
from megaresid.training.forensics import Forensics
from megaresid.training.health import Health, Next
from megaresid.training.signals import Wish, Wishes


class Outcome(Enum):
    """Why a training ended."""

    FINISHED = "finished"
    STOPPED = "stopped by a signal"
    UNHEALTHY = "unhealthy"
    UNSAVED = "unsaved"
    ROLL_BACK = "roll back"


@dataclass(frozen=True)
class Course:
    """What the loop runs: steps ``first`` to ``steps`` (exclusive), each of ``tokens_per_step`` tokens.

    ``training_seconds`` and ``skipped_steps`` are those of the steps before ``first``; ``pending`` names the hooks that
    are to be run there before the next step, where they are due: those that have given no numbers of it yet.
    ``skipped_batches`` is how many batches roll-backs have passed over: step n trains on batch n + skipped_batches.
    """

    first: int
    training_seconds: float
    skipped_steps: int
    steps: int
    tokens_per_step: int
    learning_rate: Callable[[int], float]
    flops_per_token: int
    peak_flops: float | None  # of all ranks together; None where it is not known
    pending: Collection[str] = ()
    skipped_batches: int = 0


class TrainingClock:
    """Seconds spent on training itself: evaluation and saving stop it, so that tokens per second mean training."""

    def __init__(self, spent: float):
        self._since, self._spent = time.perf_counter(), spent

    def seconds(self) -> float:
        return self._spent + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def __enter__(self) -> None:
        """Stop while the block runs."""
        self._spent, self._since = self.seconds(), None

    def __exit__(self, *_) -> None:
        self._since = time.perf_counter()


def train(
    engine: Engine,
    micro_batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    course: Course,
    intervals: IntervalOptions,
    hooks: Sequence[Hook],
    save: Callable[[int, dict[str, Any]], None],
    recorder: Recorder | None,
    strict: bool = False,
    tell_saves: Callable[[int], None] = lambda step: None,
    health: Health | None = None,
    forensics: Forensics | None = None,
    wishes: Wishes | None = None,
    diagnostics: Diagnostics | None = None,
) -> Outcome:
    """Train from ``course.first`` to ``course.steps``. Called by every rank; ``recorder`` is rank 0's alone.

    ``save(step, counters)`` writes a checkpoint of the state after ``step`` updates, on every rank. A hook that fails
    is told and recorded; where ``strict`` the state is saved then, and the failure raised as a UserError.
    ``tell_saves(step)`` is called after every step: saves go on in the background, and can fail.

    ``health`` judges every step before its update, and ``forensics`` keeps the bad ones. A checkpoint that falls due
    while updates are being skipped waits for the next good step, so that none is saved of a run gone wrong.

    ``wishes`` are asked after every step. At a wish to stop the state is saved, and evaluations that were due are left
    to the resumed run; between two evaluations a wish to stop is heard too.

    ``diagnostics`` are of the model after the steps at which they are due, and outside of the time that is trained.
    """
    health = health or Health(HealthOptions())
    wishes = wishes or Wishes()
    say = recorder.say if recorder else lambda line: None
    clock = TrainingClock(course.training_seconds)
    evaluation = Hooks(hooks)
    engine.set_step(course.first)
    due = [hook for hook in evaluation.due(course.first, course.steps) if hook.name in course.pending]
    with clock:
        failure = _evaluate(engine, due, course.first, None, course, evaluation, recorder, wishes)
    if failure and strict:
        raise UserError(failure)
    if wishes.agreed_to_stop():
        say(f"stopped by a signal at step {course.first}, before a step was made: go on with --resume auto")
        return Outcome.STOPPED
    logged_step, logged_seconds, skipped, owed = course.first, clock.seconds(), course.skipped_steps, False
    for step in range(course.first, course.steps):
        rate = course.learning_rate(step)
        engine.set_step(step + 1)
        done = step + 1
        if forensics:
            forensics.begin()
        accepts = _judge(engine, health, forensics, done, rate, say)
        diagnosing = diagnostics is not None and diagnostics.due(done)
        asked = diagnostics.noting(accepts, clock) if diagnosing else accepts
        result = engine.train_step(micro_batches, rate, asked)
        skipped += result.skipped
        _tell(health, done, say)
        last, due = done == course.steps, evaluation.due(done, course.steps)
        if recorder:
            recorder.advance(done)
        tell_saves(done)
        if _due(intervals.log_interval, done, last) or due:
            loss = result.mean_loss
            elapsed = clock.seconds() - logged_seconds
            if recorder:
                row = _row(result, loss, rate, (done - logged_step) * course.tokens_per_step / elapsed, course, engine)
                row |= {"skipped_steps": skipped, "skipped_batches": course.skipped_batches}
                row |= {"tokens": done * course.tokens_per_step}
                row |= {"training_seconds": clock.seconds()}
                recorder.record(done, row)
                recorder.progress_line(done, row)
            logged_step, logged_seconds = done, clock.seconds()
        if diagnosing:
            with clock:
                diagnostics.run(done)
        counters = {"training_seconds": clock.seconds(), "skipped_steps": skipped, "health": health.state()}
        counters |= {"skipped_batches": course.skipped_batches}
        if (onward := health.next()) is not Next.GO_ON:
            return Outcome.ROLL_BACK if onward is Next.ROLL_BACK else Outcome.UNHEALTHY
        wish = wishes.agreed()
        stopping = wish is Wish.STOP
        owed = owed or wish is Wish.SAVE or _due(intervals.checkpoint_interval, done, last)
        with clock:
            # Before an evaluation, which can take long and fail: a resumed run makes up for one that was cut short.
            if saved := stopping or (owed and (last or not health.bad_in_a_row)):
                save(done, counters)
                owed = False
            failure = None
            if due and not stopping:
                failure = _evaluate(engine, due, done, loss, course, evaluation, recorder, wishes)
                stopping = wishes.agreed_to_stop()
            if failure and strict:
                if intervals.checkpoint_interval > 0 and not saved:
                    save(done, counters)
                raise UserError(failure)
            if stopping:
                if not saved:
                    save(done, counters)
                say(f"stopped by a signal at step {done}, which is saved: go on with --resume auto")
                return Outcome.STOPPED
    return Outcome.FINISHED


def _due(interval: int, step: int, last: bool) -> bool:
    return interval > 0 and (step % interval == 0 or last)


def _judge(
    engine: Engine, health: Health, forensics: Forensics | None, step: int, rate: float, say: Callable[[str], None]
) -> Callable[[float, float], bool]:
    """What the engine asks before the update of a step: the health's answer, once a bad step's gradients are noted."""

    def accepts(loss: float, norm: float) -> bool:
        accepted = health.accepts(step, loss, norm)
        if forensics and health.verdict.reason and (failure := forensics.keep(engine, step, rate, loss, norm, health)):
            say(failure)
        return accepted

    return accepts


def _tell(health: Health, step: int, say: Callable[[str], None]) -> None:
    """A line about a bad step."""
    if reason := health.verdict.reason:
        done = "applied" if health.verdict.accepted else f"skipped, {health.bad_in_a_row} in a row"
        say(f"step {step}: {reason}; update {done}")


def _row(result: StepResult, loss: float, rate: float, speed: float, course: Course, engine: Engine) -> dict:
    return {
        "train_loss": loss,
        "learning_rate": rate,
        "gradient_norm": result.gradient_norm,
        "tokens_per_second": speed,
        "mfu": course.flops_per_token * speed / course.peak_flops if course.peak_flops else None,
        "memory_bytes": peak_memory_bytes(engine.device),
    }


def _evaluate(
    engine: Engine,
    due: Sequence[Hook],
    step: int,
    loss: float | None,
    course: Course,
    hooks: Hooks,
    recorder: Recorder | None,
    wishes: Wishes,
) -> str | None:
    """Run the hooks that are due until a wish to stop, and record each at once; of those that failed, the first one's
    failure."""
    say = recorder.say if recorder else lambda line: None
    measured, first_failure = {}, None
    for hook in due:
        if wishes.agreed_to_stop():
            break
        found, failure = hooks.run(hook, engine, say)
        if failure is not None:
            failure = f"evaluation {hook.name} failed at step {step}: {failure}"
            first_failure = first_failure or failure
            say(failure)
        measured |= found
        if recorder:
            row = {"tokens": step * course.tokens_per_step, **found}
            recorder.record(step, row, {hook.name: failure} if failure else None)
    if recorder and measured:
        recorder.evaluation_line(step, {"train_loss": loss, **measured})
    return first_failure
