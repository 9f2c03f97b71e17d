"""What diagnostics cost training: ``python -m megaresid.benchmark.diagnosing``

For one rank: seconds of a training step, and of what diagnostics add to one that is due, part by part; then of whole
steps that are due and not due, in turns. On a CPU they are seconds of the process on its cores, which other processes
do not change; on a GPU of the clock.
"""

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.errors import UserError, exits_with_user_errors


@dataclass(frozen=True)
class Request:
    """Measure what diagnostics add to training's steps."""

    model: Literal["tiny", "gpt2", "gpt2-medium"] = "tiny"
    """A preset."""
    residual: str = "vanilla"
    """As in training."""
    attention: str = "softmax"
    """As in training."""
    context: int = 128
    """Tokens of a sequence."""
    batch: int = 4
    """Sequences of a step."""
    interval: int | None = None
    """Steps from one look to the next; by default training's own default."""
    repeats: int = 3
    """Measurements of each kind, of which the median counts."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Cost:
    """Seconds, and in percent of the time of the steps: ``percent`` of all that is done each time, ``drawing_percent``
    of the figures at most, which are drawn more seldom where they would cost more."""

    model: str
    residual: str
    device: str
    interval: int
    numbers: int
    step: float
    gradient_norms: float
    probe: float
    recording: float
    drawing: float
    due_step: float
    percent: float
    percent_in_turns: float
    drawing_percent: float


@exits_with_user_errors
def main(arguments: list[str] | None = None) -> None:
    request = tyro.cli(Request, args=arguments, prog="python -m megaresid.benchmark.diagnosing")
    if request.repeats < 1:
        raise UserError(f"--repeats {request.repeats}: must be at least 1")
    choose_accelerator()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        cost = measure(request, Path(folder))
    print(json.dumps(asdict(cost), indent=2) if request.json else "\n".join(table(cost)))


def measure(request: Request, folder: Path) -> Cost:
    import torch
    from deepspeed.runtime.torch_autocast import autocast_if_enabled

    from megaresid.config import IntervalOptions, from_flat
    from megaresid.evaluation.undisturbed import undisturbed
    from megaresid.monitoring.figures import figures
    from megaresid.monitoring.metrics import Recorder
    from megaresid.monitoring.mirror import mirror
    from megaresid.monitoring.probe import probe
    from megaresid.training.diagnostics import DRAWING, SEQUENCES, Diagnostics, samples_of
    from megaresid.training.ds_config import plan_batch, resolve
    from megaresid.training.engine import Engine, start_process_group
    from megaresid.training.forensics import by_layer, parameter_and_gradient_norms

    sizes = {"context": request.context, "global_batch_size": request.batch, "micro_batch_size": request.batch}
    variant = {"model": request.model, "residual": request.residual, "attention": request.attention}
    interval = request.interval or IntervalOptions().diagnose_interval
    config = from_flat(variant | sizes, "benchmark")
    start_process_group()
    path, batch = folder / "ds.json", plan_batch(config, 1)
    path.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}))
    engine = Engine(config.plan(), config, resolve(path, config, batch), batch)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(engine.vocab_size, (request.batch, request.context + 1), generator=generator)
    batches = itertools.repeat((tokens[:, :-1], tokens[:, 1:]))
    idx, model = tokens[:1, :-1].repeat(SEQUENCES, 1), mirror(engine.model)
    seconds = _Seconds(time.process_time if engine.device.type == "cpu" else time.perf_counter)

    def looked_at():
        with undisturbed(model, engine.device), autocast_if_enabled(engine.deepspeed):
            return probe(model, idx.to(engine.device), engine.whole)

    def accepts(loss: float, norm: float) -> bool:
        norms = lambda: by_layer(parameter_and_gradient_norms(engine.deepspeed, engine.parameters))  # noqa: E731
        seconds.of("gradient_norms", norms)
        return True

    def draw(recorder: Recorder, step: int) -> None:
        for name, figure in figures(found, f"step {step}"):
            recorder.figure(name, figure, step)

    with Recorder(folder, 0, request.repeats) as recorder:
        engine.train_step(batches, 1e-4, accepts)
        looked_at()
        seconds.clear()
        for step in range(request.repeats):
            engine.train_step(batches, 1e-4, accepts)
            found = seconds.of("probe", looked_at)
            numbers = found.numbers()
            seconds.of("recording", lambda: recorder.diagnosis(step, numbers, samples_of(found)))
            seconds.of("drawing", lambda: draw(recorder, step))
        diagnostics = Diagnostics(engine, idx, interval, recorder)
        diagnostics.run(0)  # which draws, and for long no other does
        for step in range(request.repeats):
            seconds.of("step", lambda: engine.train_step(batches, 1e-4))

            def due() -> None:
                engine.train_step(batches, 1e-4, diagnostics.noting(lambda *_: True, nullcontext()))
                diagnostics.run(step)

            seconds.of("due_step", due)
    engine.deepspeed.destroy()
    found = seconds.medians()
    share = 100 / (interval * found["step"])
    return Cost(
        model=request.model,
        residual=request.residual,
        device=str(engine.device),
        interval=interval,
        numbers=len(numbers),
        **found,
        percent=share * (found["gradient_norms"] + found["probe"] + found["recording"]),
        percent_in_turns=share * (found["due_step"] - found["step"]),
        drawing_percent=min(100 * DRAWING, share * found["drawing"]),
    )


class _Seconds:
    """Times of acts by name."""

    def __init__(self, clock: Callable[[], float]):
        self._clock, self._times = clock, {}

    def of(self, name: str, act: Callable[[], object]):
        since = self._clock()
        result = act()
        self._times.setdefault(name, []).append(self._clock() - since)
        return result

    def clear(self) -> None:
        self._times = {}

    def medians(self) -> dict[str, float]:
        return {name: median(times) for name, times in self._times.items()}


def table(cost: Cost) -> list[str]:
    rows = [
        ("training step", cost.step, None),
        ("gradient norms", cost.gradient_norms, None),
        ("probe", cost.probe, None),
        (f"recording {cost.numbers} numbers", cost.recording, None),
        ("all of them", cost.gradient_norms + cost.probe + cost.recording, cost.percent),
        ("the same, from steps in turns", cost.due_step - cost.step, cost.percent_in_turns),
        ("drawing, at most", cost.drawing, cost.drawing_percent),
    ]
    lines = [f"{cost.model}, {cost.residual}, {cost.device}, every {cost.interval} steps"]
    lines.append(f"{'':32}{'seconds':>10}{'% of the steps':>16}")
    for name, seconds, percent in rows:
        lines.append(f"{name:32}{seconds:10.3f}" + (f"{percent:16.3f}" if percent is not None else ""))
    return lines


if __name__ == "__main__":
    main()
