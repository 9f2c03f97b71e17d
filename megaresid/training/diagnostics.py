"""Diagnostics of a run while it trains: at an interval, a probe of the model and the gradient's norm by depth.

Nothing of the training is changed by it, bit for bit: the probe runs through a mirror of the model, which has none of
the training's hooks, and what it could disturb is restored. At step n it sees the parameters after n updates, and the
gradient, before clipping, that the n-th update was made from.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from torch import Tensor

from megaresid.data.loader import read_batch
from megaresid.data.mixture import RunData
from megaresid.data.sampler import windows
from megaresid.errors import UserError
from megaresid.evaluation.undisturbed import undisturbed
from megaresid.model.presets import ModelShape
from megaresid.monitoring.findings import Findings
from megaresid.monitoring.metrics import Recorder
from megaresid.monitoring.mirror import mirror
from megaresid.monitoring.probe import probe
from megaresid.training.engine import Engine
from megaresid.training.forensics import by_layer, parameter_and_gradient_norms
from megaresid.users_code import mistakes_told

SEQUENCES = 2
DRAWING = 0.01
"""Of the time since the start at most, for drawing: one probe's figures cost as much as many steps of a tiny model."""

Accepts = Callable[[float, float], bool]


def probe_tokens(data: RunData, shape: ModelShape) -> Tensor:
    """int64 [m, context]: the first sequences of the validation split, of the training tokens where there is none."""
    stream, context = data.validation(shape.context, SEQUENCES * shape.context), shape.context
    if stream is None or not windows(len(stream), context):
        stream = data.training(context)
    first = np.arange(min(SEQUENCES, windows(len(stream), context)))
    return read_batch(stream, first, context, shape.vocab_size)[0]


class Diagnostics:
    """Every rank makes one and calls its methods alike; ``recorder`` is rank 0's alone.

    ``idx`` [m, T] must be the same on all ranks. Diagnostics that fail are off from there on, and the run goes on.
    """

    def __init__(self, engine: Engine, idx: Tensor, interval: int, recorder: Recorder | None):
        self._engine, self._interval, self._recorder = engine, interval, recorder
        self._model, self._idx = mirror(engine.model), idx.to(engine.device)
        self._gradients: dict[str, tuple[float, float]] = {}
        self._since, self._drawing = time.perf_counter(), 0.0
        self._failed = False

    def due(self, step: int) -> bool:
        """Whether to look at the model after ``step`` updates."""
        return not self._failed and step % self._interval == 0

    def noting(self, accepts: Accepts, clock: AbstractContextManager) -> Accepts:
        """``accepts`` of a step that is due, which notes the gradients while they are there; ``clock`` is stopped."""

        def noted(loss: float, norm: float) -> bool:
            with clock:
                norms = parameter_and_gradient_norms(self._engine.deepspeed, self._engine.parameters)
            self._gradients = by_layer(norms)
            return accepts(loss, norm)

        return noted

    def run(self, step: int) -> None:
        """Look at the model after ``step`` updates, and record it."""
        since, failure, findings = time.perf_counter(), None, Findings()
        try:
            findings = self._probe()
        except Exception as error:
            failure = _told(error)
        if self._any_rank(failure is not None):
            self._fail(failure or "on another rank")
            return
        for layer, (_, norm) in self._gradients.items():
            findings.note("gradient_norm", layer.removeprefix("layers."), norm)
        if self._recorder:
            seconds = {"diagnostics/seconds": time.perf_counter() - since}
            try:
                self._recorder.diagnosis(step, findings.numbers() | seconds, samples_of(findings))
                self._draw(step, findings)
            except Exception as error:
                self._recorder.say(f"step {step}: diagnostics could not be recorded or drawn: {_told(error)}")

    def _probe(self) -> Findings:
        engine = self._engine
        with mistakes_told(), undisturbed(self._model, engine.device), autocast_if_enabled(engine.deepspeed):
            return probe(self._model, self._idx, engine.whole)

    def _any_rank(self, failed: bool) -> bool:
        """Whether on any rank: all of them stop then, since some of what they do is done together."""
        if dist.get_world_size() == 1:
            return failed
        flag = torch.tensor(int(failed), device=self._engine.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _fail(self, failure: str) -> None:
        self._failed = True
        if self._recorder:
            self._recorder.say(f"diagnostics failed and are off from here on: {failure}")

    def _draw(self, step: int, findings: Findings) -> None:
        from megaresid.monitoring.figures import figures  # which takes a second to import

        since = time.perf_counter()
        if self._drawing > DRAWING * (since - self._since):
            return
        for name, figure in figures(findings, f"step {step}"):
            self._recorder.figure(f"diagnostics/{name}", figure, step)
        self._drawing += time.perf_counter() - since


def samples_of(findings: Findings) -> dict[str, np.ndarray]:
    """Of each quantity, the values of all places in one histogram."""
    return {f"diagnostics/{name}": np.concatenate([*places.values()]) for name, places in findings.samples.items()}


def _told(error: Exception) -> str:
    return " ".join((str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}").split())
