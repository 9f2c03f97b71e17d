"""Whether a step's numbers are those of a healthy run: asked before the update is made, answered alike on all ranks."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megaresid.config import HealthOptions

LEAST_DEVIATION_OF_LOSS = 0.05
"""Nats. A loss moves so much between steps of the steadiest run when one batch is harder than another."""
LEAST_DEVIATION_OF_NORM = 0.25
"""Of the logarithm: a quarter up or down. Clipping is there for what is a few times larger than usual."""


@dataclass(frozen=True)
class Verdict:
    """Of one step, numbered from 1: what is wrong with it (None: nothing), how many standard deviations loss and norm
    lie above those of the window (None before it is full, or for what is not finite), and whether the update is made.
    """

    step: int
    reason: str | None
    loss_z: float | None
    norm_z: float | None
    accepted: bool


class Next(Enum):
    """How a run goes on after a step."""

    GO_ON = "go on"
    STOP = "stop"
    ROLL_BACK = "roll back"


class Health:
    """Judges each step by its global loss and gradient norm, and remembers the good ones.

    A loss or norm that is not finite is always refused. A spike is one that lies more than ``threshold`` standard
    deviations above the mean of the last ``window`` good steps: the loss in nats, the norm by its logarithm, since
    norms spread by factors. Falls are no spikes. Before the window is full nothing finite is a spike.

    The default of 8 deviations over 100 steps leaves a normal run alone. The deviation is of the single step, so noise
    of any size is allowed for; while the loss falls steeply, the fall widens it. It is never taken as less than 0.05
    nats or a quarter of the norm, so in the steadiest run a spike is a loss 0.4 nats above the window's mean or a norm
    above e^2 = 7.4 times the usual. Noise with normal tails comes so far once in 1e15 steps.

    Only steps whose update is made enter the window: bad ones in a row do not make each other normal. A lasting change
    of level (another kind of text from some step on) therefore counts as bad, and ends in ``STOP`` after
    ``max_bad_steps``; where spikes are applied (``--on-spike none``), it becomes the usual.
    """

    def __init__(self, options: HealthOptions, state: dict[str, Any] | None = None):
        """``state`` is an earlier one's ``state()``: judgements go on as if there had been no break."""
        state = state or {}
        self.options = options
        self._losses = deque(state.get("losses", ()), options.spike_window)
        self._log_norms = deque(state.get("log_norms", ()), options.spike_window)
        self.bad_in_a_row: int = state.get("bad_in_a_row", 0)
        self.bad_steps: int = state.get("bad_steps", 0)
        self.verdict: Verdict | None = None

    def accepts(self, step: int, loss: float, norm: float) -> bool:
        """Judge step ``step`` by the global batch's mean loss and the norm of its gradient before clipping."""
        self.verdict = self._judged(step, loss, norm)
        self.bad_steps += self.verdict.reason is not None
        self.bad_in_a_row = 0 if self.verdict.accepted else self.bad_in_a_row + 1
        if self.verdict.accepted:
            self._losses.append(loss)
            self._log_norms.append(_log(norm))
        return self.verdict.accepted

    def next(self) -> Next:
        """What follows from the steps so far."""
        if self.verdict is None or self.verdict.accepted:
            return Next.GO_ON
        if self.options.on_spike == "stop":
            return Next.STOP
        if self.bad_in_a_row < self.options.max_bad_steps:
            return Next.GO_ON
        return Next.ROLL_BACK if self.options.on_spike == "rollback" else Next.STOP

    def state(self) -> dict[str, Any]:
        """For a checkpoint, JSON-able; floats come back bit for bit."""
        return {
            "losses": list(self._losses),
            "log_norms": list(self._log_norms),
            "bad_in_a_row": self.bad_in_a_row,
            "bad_steps": self.bad_steps,
        }

    def window(self) -> dict[str, Any]:
        """What the next step is judged by: for the record of a bad one."""
        return {
            "steps": len(self._losses),
            "loss_mean": _mean(self._losses),
            "loss_deviation": _deviation(self._losses),
            "log_norm_mean": _mean(self._log_norms),
            "log_norm_deviation": _deviation(self._log_norms),
        }

    def _judged(self, step: int, loss: float, norm: float) -> Verdict:
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return Verdict(step, f"the {what} is not finite", None, None, False)
        if len(self._losses) < self.options.spike_window:
            return Verdict(step, None, None, None, True)
        loss_z = _score(loss, self._losses, LEAST_DEVIATION_OF_LOSS)
        norm_z = _score(_log(norm), self._log_norms, LEAST_DEVIATION_OF_NORM)
        spiking = (("loss", loss, loss_z), ("gradient norm", norm, norm_z))
        for what, value, score in spiking:
            if score > self.options.spike_threshold:
                reason = f"the {what} {value:.4g} is {score:.1f} standard deviations above the last good steps"
                return Verdict(step, reason, loss_z, norm_z, self.options.on_spike == "none")
        return Verdict(step, None, loss_z, norm_z, True)


def finite(loss: float, norm: float) -> bool:
    """The least that is asked of a step."""
    return math.isfinite(loss) and math.isfinite(norm)


def _score(value: float, window: Sequence[float], least: float) -> float:
    return (value - _mean(window)) / max(_deviation(window), least)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    if not values:
        return None
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
