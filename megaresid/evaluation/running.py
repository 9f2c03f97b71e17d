"""The hooks of a training, run between its steps.

What a hook's ``measure`` must hold to: every rank calls it with the same engine at the same step. It returns finite or
unfinite numbers by name, equal on all ranks; a name belongs to the hook that gave it first. It calls collectives, and
the engine's methods, on every rank equally often; what only one rank can find wrong (a file on its disk) it must carry
to a point behind them before it raises. It leaves parameters and gradients alone; generators, training mode, buffers
and PyTorch's settings are restored around it, and gradients are off.

A measure that raises, or returns something else, has failed: its numbers are dropped on every rank, and the run goes on
unless --eval-strict is given. Where it failed on all ranks, or on some behind its last collective, the ranks agree on
that. A rank that failed alone in the midst of collectives has left the others waiting there, and nothing can call them
back: it waits for ``PATIENCE``, says so and ends the run, so that none hangs for good.
"""

import inspect
import numbers
import re
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megaresid.errors import UserError
from megaresid.evaluation.hook import Hook
from megaresid.evaluation.undisturbed import undisturbed
from megaresid.process_groups import own_group

if TYPE_CHECKING:
    from megaresid.training.engine import Engine

PATIENCE = timedelta(minutes=5)
LONG_SECONDS = 10.0
"""A hook that took longer, or was never run, is announced."""
RESERVED = frozenset(
    "schema step tokens train_loss learning_rate gradient_norm tokens_per_second mfu memory_bytes skipped_steps "
    "skipped_batches "
    "training_seconds failed failed_saves".split()
)
"""Names in metrics.jsonl that are the training's own; so is all below ``seconds/``."""


class Hooks:
    """The hooks of one run and what is known of them so far. Made and called by every rank."""

    def __init__(self, hooks: Sequence[Hook]):
        self._hooks = hooks
        self._seconds: dict[str, float] = {}
        self._owners: dict[str, str] = {}
        # Its own group: a rank that failed must not meet the others in a collective of the measure.
        self._group = own_group("evaluation") if hooks and dist.get_world_size() > 1 else None

    def due(self, step: int, last: int) -> list[Hook]:
        return [hook for hook in self._hooks if hook.due(step, last)]

    def run(self, hook: Hook, engine: "Engine", say: Callable[[str], None]) -> tuple[dict[str, float], str | None]:
        """The numbers of one hook with the seconds that it took as ``seconds/NAME``, and what went wrong, if anything;
        the same on all ranks."""
        if self._seconds.get(hook.name, LONG_SECONDS) >= LONG_SECONDS:
            say(f"evaluating {hook.name}")
        since, found, failure = time.perf_counter(), {}, None
        module = engine.deepspeed if hasattr(engine, "deepspeed") else engine.model  # of a live engine, a loaded model
        try:
            with undisturbed(module, engine.device), torch.no_grad():
                returned = hook.measure(engine)
        except (Exception, SystemExit) as error:
            failure = _told(error, hook)
        else:
            try:
                found = self._checked(hook.name, returned)
            except (TypeError, ValueError, OverflowError) as error:
                failure = str(error)
        failure = self._agreed(hook.name, failure)
        self._seconds[hook.name] = time.perf_counter() - since
        if failure is not None:
            return {}, failure
        self._owners |= dict.fromkeys(found, hook.name)
        return found | {f"seconds/{hook.name}": self._seconds[hook.name]}, None

    def _checked(self, hook: str, found: object) -> dict[str, float]:
        """What a measure returned, as Python's floats; raises TypeError and ValueError."""
        if not isinstance(found, dict):
            raise TypeError(f"it returned {type(found).__name__}, not a dictionary of numbers by name")
        for name, value in found.items():
            if not (isinstance(name, str) and re.fullmatch(r"[^\s=,]+", name)):
                raise ValueError(f"{name!r} is no name of a number: no blank, comma or equals sign is in one")
            if not isinstance(value, numbers.Real):
                raise TypeError(f"{name} is {type(value).__name__}, not a number")
            if name in RESERVED or name.startswith("seconds/"):
                raise ValueError(f"{name} is a name of the training's own: choose another")
            if (owner := self._owners.get(name, hook)) != hook:
                raise ValueError(f"{name} is {owner}'s: choose another name")
        return {name: float(value) for name, value in found.items()}

    def _agreed(self, hook: str, failure: str | None) -> str | None:
        """What went wrong on the first rank where something did, for all ranks; which rank, if not on all."""
        if self._group is None:
            return failure
        failures = [None] * dist.get_world_size()
        if failure is not None:
            try:
                dist.monitored_barrier(self._group, timeout=PATIENCE)
            except RuntimeError:
                raise UserError(
                    f"evaluation {hook} failed on this rank alone and left the others waiting for it ({failure}): the "
                    "run ends here; go on with it by --resume auto",
                    rank_local=True,
                ) from None
        else:
            dist.monitored_barrier(self._group)
        dist.all_gather_object(failures, failure, group=self._group)
        failed = [rank for rank, failure in enumerate(failures) if failure is not None]
        if not failed:
            return None
        return f"{failures[failed[0]]}{'' if len(failed) == len(failures) else f' (on rank {failed[0]})'}"


def _told(error: Exception, hook: Hook) -> str:
    """One line: what went wrong, and the innermost line of the measure's own file where it did."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    text = " ".join("".join(traceback.format_exception_only(error)).split())  # where str(error) fails, it says so
    measure = hook.measure if inspect.isroutine(hook.measure) else type(hook.measure)
    try:
        own = inspect.getsourcefile(measure)
    except TypeError:
        own = None
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
    return f"{text} ({frame.filename}, line {frame.lineno})"
