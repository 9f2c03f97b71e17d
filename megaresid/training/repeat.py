"""A bad step made once more, on one process: what ``megaresid.replay`` carries out and prints."""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaresid.config import RunConfig, from_flat
from megaresid.data.loader import read_batch
from megaresid.data.mixture import RunData, open_data
from megaresid.data.sampler import sample_indices
from megaresid.errors import UserError
from megaresid.exchange.folder import is_folder
from megaresid.exchange.into_engine import copy_exported
from megaresid.model.gpt import GPT, canonical_name
from megaresid.model.init import derived_seed
from megaresid.training.checkpoint import copy_parameters, load_checkpoint
from megaresid.training.checkpoint_format import SavedState
from megaresid.training.ds_config import MONITORS, plan_batch, resolve
from megaresid.training.engine import Engine
from megaresid.training.forensics import (
    by_layer,
    generator_states,
    generator_texts,
    kept_steps,
    nearest_checkpoint,
    parameter_and_gradient_norms,
    read_step,
    set_generators,
)
from megaresid.training.health import Health
from megaresid.training.run_dir import read_json
from megaresid.training.schedule import learning_rate
from megaresid.users_code import mistakes_told

TOLERANCE = 1e-6
"""Of losses, relative: on one process sums over ranks are made in another order."""
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "schema")
WORST = 3


@dataclass(frozen=True)
class BadStep:
    """What a run has kept of a step, and what is needed to repeat it."""

    run: Path
    step: int
    kept: dict[str, Any]
    config: RunConfig
    data: RunData
    start: Path | None
    """The checkpoint to start from; None for the run's first weights."""


@dataclass(frozen=True)
class Repeated:
    """A bad step once more. ``losses`` are those of each rank's micro-batches, ``norms`` (parameter, gradient) by name,
    ``first_not_finite`` the module whose output was the first not to be finite, ``worst`` (loss, sample, place)."""

    bad: BadStep
    losses: list[list[float]]
    loss: float
    gradient_norm: float
    norms: Mapping[str, tuple[float, float]]
    first_not_finite: str | None
    worst: list[tuple[float, int, str]]

    @property
    def difference(self) -> float:
        """The largest relative difference of a micro-batch's loss from the run's; infinite where one of the two is not
        finite and the other is, or is so otherwise."""
        kept = [rank["losses"] for rank in self.bad.kept["ranks"]]
        return max(_difference(a, float(b)) for mine, its in zip(self.losses, kept) for a, b in zip(mine, its))

    @property
    def reproduced(self) -> bool:
        return self.difference <= TOLERANCE

    def lines(self) -> Iterator[str]:
        bad, kept = self.bad, self.bad.kept
        yield f"step {bad.step} of {bad.run}: {kept['reason']}"
        start = bad.start.name if bad.start else "the first weights"
        yield f"repeated from {start}, of {len(kept['ranks'])} ranks on one"
        yield f"loss           {self.loss:<14.8g} the run had {float(kept['loss']):.8g}"
        yield f"gradient norm  {self.gradient_norm:<14.8g} the run had {float(kept['gradient_norm']):.8g}"
        yield f"{'':14} {'parameters':>12} {'gradient':>12} {'the run had':>12}"
        for layer, (parameter, gradient) in by_layer(self.norms).items():
            before = float(kept["layers"].get(layer, {}).get("gradient_norm", math.nan))
            yield f"{layer:14} {parameter:12.6g} {gradient:12.6g} {before:12.6g}"
        yield f"first tensor that is not finite: {self.first_not_finite or 'none in the forward pass'}"
        bad_gradients = [name for name, (_, gradient) in self.norms.items() if not math.isfinite(gradient)]
        if bad_gradients:
            count = f"{len(bad_gradients)} of {len(self.norms)}"
            yield f"gradients that are not finite: {count}, such as {bad_gradients[-1]}"
        for loss, sample, place in self.worst:
            yield f"sequence {sample}: loss {loss:.4f}, {place}"
        how = "bit for bit" if self.difference == 0 else f"to {self.difference:.1e}"
        yield f"reproduced {how}" if self.reproduced else f"NOT reproduced: losses differ by {self.difference:.1e}"


def open_step(run: Path, step: int | None, data: tuple[Path, ...] = ()) -> BadStep:
    """Find all that is needed to repeat a bad step (by default the first that was kept); raises UserError."""
    stored = read_json(run, "config.json")
    stored.pop("schema", None)
    steps = kept_steps(run)
    if step is None and not steps:
        raise UserError(f"--run {run}: it has kept no bad step: there is nothing to repeat")
    kept = read_step(run, steps[0] if step is None else step)
    config = from_flat(stored, str(run / "config.json"))
    # As one rank; the graphs of a compiled model would hide its modules' outputs.
    changes = {"compile": False, "pipeline_stages": 1}
    micro = len(kept["ranks"][0]["samples"][0])
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"data": data or config.run.data}),
            "execution": config.execution.model_copy(update=changes),
            "batch": config.batch.model_copy(update={"micro_batch_size": micro}),
        }
    )
    options = config.run
    vocab_size = config.shape.vocab_size
    opened = open_data(
        options.data, options.data_weights, options.data_order, options.align_documents,
        vocab_size=vocab_size, validating=False,
    )  # fmt: skip
    start = nearest_checkpoint(run, kept["step"])
    if start:
        with SavedState(start) as saved:
            identity = saved.header.identity.get("data", opened.identity)
        if identity != opened.identity:
            raise UserError(f"--data {options.data[0]}: it is not the data of {run}: name that by --data")
    return BadStep(run, kept["step"], kept, config, opened, start)


def repeat(bad: BadStep) -> Repeated:
    """Train up to the step and make it, without its update. The process must be the only one of its group."""
    config, ranks = bad.config, bad.kept["ranks"]
    with mistakes_told():
        plan = config.plan()
    batch = plan_batch(config, 1)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(plan, config, resolve(_deepspeed_json(bad.run, Path(folder)), config, batch), batch)
    first, counters, generators = _start(engine, bad)
    source = Source(bad, plan.shape.context, plan.shape.vocab_size, generators)
    health, skipped = Health(config.health, counters.get("health")), counters.get("skipped_batches", 0)
    for step in range(first, bad.step - 1):
        engine.set_step(step + 1)
        rate = learning_rate(step, config.run.steps, config.optimizer)
        samples = source.samples_of(step + skipped)
        engine.train_step(source.batches(samples), rate, lambda *numbers: health.accepts(step + 1, *numbers))
        source.note_generators()
    if bad.kept["ranks"][0]["generators"]:
        source.generators = [rank["generators"] for rank in ranks]
    engine.set_step(bad.step)
    samples, norms = [rank["samples"] for rank in ranks], {}

    def refuse(*_) -> bool:
        norms.update(parameter_and_gradient_norms(engine.deepspeed, engine.parameters))
        return False

    watch = FirstNotFinite(engine.deepspeed.module)
    with watch:
        result = engine.train_step(source.batches(samples), 0.0, refuse)
    losses = torch.stack(engine.micro_losses).view(len(ranks), -1).tolist()
    worst = source.worst(engine, samples)
    engine.deepspeed.destroy()
    return Repeated(bad, losses, result.mean_loss, result.gradient_norm, norms, watch.found, worst)


class Source:
    """The micro-batches of all of a run's ranks, one rank behind the other, each with that rank's generators."""

    def __init__(self, bad: BadStep, context: int, vocab_size: int, generators: list[dict[str, str]]):
        self._stream, self._context, self._vocab_size = bad.data.training(context), context, vocab_size
        self._sampler = bad.data.sampler(context, bad.config.run.seed)
        self._accumulation = len(bad.kept["ranks"][0]["samples"])
        micro = bad.config.batch.micro_batch_size
        self._sizes = {"global_batch": bad.config.batch.global_batch_size, "micro_batch": micro}
        self._sizes["ranks"] = self._sizes["global_batch"] // (micro * self._accumulation)
        self.generators = generators

    def samples_of(self, batch: int) -> list[list[list[int]]]:
        """The samples of each rank's micro-batches."""
        ranks, all_micro = range(self._sizes["ranks"]), range(self._accumulation)
        return [[sample_indices(batch, a, rank, **self._sizes).tolist() for a in all_micro] for rank in ranks]

    def batches(self, samples: list[list[list[int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        for rank, of_rank in enumerate(samples):
            if rank:
                self.generators[rank - 1] = generator_texts(generator_states())
            set_generators(self.generators[rank])
            for micro in of_rank:
                windows = self._sampler.window_of(np.array(micro))
                yield read_batch(self._stream, windows, self._context, self._vocab_size)

    def note_generators(self) -> None:
        """After a step: those of the last rank."""
        self.generators[-1] = generator_texts(generator_states())

    def worst(self, engine: Engine, samples: list[list[list[int]]]) -> list[tuple[float, int, str]]:
        """The sequences with the highest loss (in evaluation mode), with the place of their first token."""
        found = []
        for micro in (micro for of_rank in samples for micro in of_rank):
            windows = self._sampler.window_of(np.array(micro))
            idx, targets = read_batch(self._stream, windows, self._context, self._vocab_size)
            log_p, _ = engine.score(idx, targets)
            for sample, window, loss in zip(micro, windows.tolist(), (-log_p.view(idx.shape).mean(1)).tolist()):
                shard, offset = self._stream.place(window, 0, self._context)
                found.append((loss, sample, f"{shard.name} from token {offset} on"))
        return sorted(found, key=lambda one: math.inf if math.isnan(one[0]) else one[0], reverse=True)[:WORST]


class FirstNotFinite:
    """Watches the outputs of all modules while the block runs; ``found`` is the first that is not finite."""

    def __init__(self, model: GPT):
        self._model, self._hooks = model, []
        self.found: str | None = None

    def __enter__(self) -> "FirstNotFinite":
        for path, module in self._model.named_modules():
            if path and path not in ("parts", "shared"):
                name = path if path == "head" else canonical_name(f"{path}.x", self._model.prefixes).removesuffix(".x")
                self._hooks.append(module.register_forward_hook(lambda _, __, out, name=name: self._look(name, out)))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, name: str, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else (output,)
        for tensor in tensors:
            if self.found is None and isinstance(tensor, Tensor) and tensor.is_floating_point():
                count = int((~torch.isfinite(tensor.detach())).sum())
                if count:
                    self.found = f"the output of {name}, {count} of {tensor.numel()} elements"


def _start(engine: Engine, bad: BadStep) -> tuple[int, dict[str, Any], list[dict[str, str]]]:
    """Bring the engine to the checkpoint: its step and counters, and the generators of each of the run's ranks."""
    if bad.start:
        state = load_checkpoint(engine.deepspeed, engine.parameters, bad.start)
        with SavedState(bad.start) as saved:
            # Of a pipeline's ranks, which stand stage by stage, those of the last stage, as are those of the bad step.
            return state.step, state.counters, list(saved.header.generators[-len(bad.kept["ranks"]) :])
    if weights := bad.config.run.init_from:
        copy = copy_exported if is_folder(weights) else copy_parameters
        copy(engine.deepspeed, engine.parameters, weights)
    generators = []
    for rank in range(len(bad.kept["ranks"])):
        torch.manual_seed(derived_seed(bad.config.run.seed, f"dropout of rank {rank}"))
        generators.append(generator_texts(generator_states()))
    return 0, {}, generators


def _deepspeed_json(run: Path, folder: Path) -> Path:
    """The run's DeepSpeed JSON for another number of ranks."""
    tree = read_json(run, "ds_config.json")
    tree = {key: value for key, value in tree.items() if key not in (*BATCH_KEYS, *MONITORS)}
    path = folder / "ds_config.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def _difference(one: float, other: float) -> float:
    if math.isfinite(one) and math.isfinite(other):
        return abs(one - other) / max(abs(other), 1e-30)
    return 0.0 if str(one) == str(other) else math.inf
