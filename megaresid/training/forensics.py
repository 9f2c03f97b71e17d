"""What is kept of a bad step, so that it can be looked into and repeated: ``RUN/forensics/step_00000200.json``."""

import base64
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megaresid.data.sampler import sample_indices
from megaresid.errors import UserError
from megaresid.training.checkpoint_format import FOLDER as CHECKPOINTS
from megaresid.training.checkpoint_format import checkpoints_in, step_dir
from megaresid.training.ds_config import Batch
from megaresid.training.run_dir import environment, write_json
from megaresid.training.zero_state import live_state

SCHEMA = 1
FOLDER = "forensics"
FIRST, EVERY, LAST = 20, 10, 1000
"""Of a run's bad steps the first 20 are kept, then every 10th, none after the 1000th."""


class Forensics:
    """Keeps the bad steps of one run. Every rank makes one, and calls its methods alike."""

    def __init__(self, run_dir: Path, skipped_batches: int):
        self.folder = run_dir / FOLDER
        self._skipped = skipped_batches
        self._generators: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Before a step: note the generators, which its dropout draws from."""
        self._generators = generator_states()

    def keep(self, engine, step: int, learning_rate: float, loss: float, norm: float, health) -> str | None:
        """Write what is known of the bad step ``step`` (numbered from 1, as in the metrics) while its gradients are
        there. What went wrong, on rank 0, if it could not be written: the run goes on."""
        count = health.bad_steps
        if count > FIRST and (count % EVERY or count > LAST):
            return None
        batch: Batch = engine.batch
        rank = getattr(engine, "data_rank", dist.get_rank())
        sizes = {"global_batch": batch.sequences, "ranks": batch.ranks, "micro_batch": batch.micro}
        number = step - 1 + self._skipped
        mine = {
            "losses": [_number(loss.item()) for loss in engine.micro_losses],
            "samples": [sample_indices(number, a, rank, **sizes).tolist() for a in range(batch.accumulation)],
            "generators": generator_texts(self._generators),
        }
        norms = parameter_and_gradient_norms(engine.deepspeed, engine.parameters)
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (rank, mine))
        if dist.get_rank() != 0:
            return None
        # Of a pipeline's stages, which have the same samples, the last one has the losses.
        of_ranks = dict(sorted(gathered, key=lambda one: (one[0], len(one[1]["losses"]))))
        verdict = health.verdict
        tree = {
            "schema": SCHEMA,
            "step": step,
            "reason": verdict.reason,
            "updated": verdict.accepted,
            "loss": _number(loss),
            "gradient_norm": _number(norm),
            "loss_z": verdict.loss_z,
            "norm_z": verdict.norm_z,
            "window": health.window(),
            "skipped_in_a_row": health.bad_in_a_row,
            "learning_rate": learning_rate,
            "skipped_batches": self._skipped,
            "ranks": list(of_ranks.values()),
            "not_finite": [name for name, pair in norms.items() if not all(map(math.isfinite, pair))],
            "layers": {layer: _named(pair) for layer, pair in by_layer(norms).items()},
            "parameters": {name: _named(pair) for name, pair in norms.items()},
            "versions": environment()["versions"],
        }
        try:
            self.folder.mkdir(exist_ok=True)
            write_json(self.folder / f"{step_dir(step)}.json", tree)
        except OSError as error:
            return f"forensics of step {step} were not written: {error.strerror}"
        return None


def nearest_checkpoint(run: Path, step: int) -> Path | None:
    """The newest complete checkpoint of the state before step ``step`` (numbered from 1) or of an earlier one."""
    found = [path for path in checkpoints_in(run / CHECKPOINTS) if int(path.name.removeprefix("step_")) < step]
    return found[-1] if found else None


def kept_steps(run: Path) -> list[int]:
    """The bad steps of a run that are kept."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (run / FOLDER).glob("step_*.json"))


def read_step(run: Path, step: int) -> dict[str, Any]:
    """What was kept of a bad step; raises UserError."""
    path = run / FOLDER / f"{step_dir(step)}.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"--step {step}: nothing was kept of it; kept are {kept_steps(run) or 'none'}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
        raise UserError(f"{path}: it is not of this version of megaresid")
    return tree


def parameter_and_gradient_norms(engine, parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[float, float]]:
    """(norm of the parameter, norm of its gradient) by canonical name, of the whole model; what is not finite makes its
    norm so. Every rank calls it, after the last backward pass of a step and before the update."""
    # A pipeline's last stage has a copy of the first one's tied matrix, which counts once.
    parameters = {name: p for name, p in parameters.items() if not getattr(p, "ds_pipe_replicated", False)}
    whole: dict[str, list[float]] = {}
    squares: dict[str, list[float]] = {name: [0.0, 0.0] for name in parameters}
    for fragment in live_state(engine, parameters).fragments:
        square = _square(fragment.of(fragment.owner))
        if fragment.replicated:
            whole.setdefault(fragment.name, [0.0, 0.0])[0] = square
        else:
            squares[fragment.name][0] += square
    unsharded = isinstance(engine.optimizer, torch.optim.Optimizer)
    for name, run in gradient_runs(engine, parameters):
        if unsharded:
            whole[name][1] = _square(run)
        else:
            squares[name][1] += _square(run)
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (whole, squares))
    total: dict[str, list[float]] = {}
    for _, parts in of_ranks:
        for name, pair in parts.items():
            total[name] = [a + b for a, b in zip(total.get(name, (0.0, 0.0)), pair)]
    # What every rank holds whole counts once.
    for name in total:
        one = next((whole[name] for whole, _ in of_ranks if name in whole), (0.0, 0.0))
        total[name] = [a + b for a, b in zip(total[name], one)]
    return {name: (math.sqrt(parameter), math.sqrt(gradient)) for name, (parameter, gradient) in total.items()}


def gradient_runs(engine, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of each averaged gradient, by canonical name, between the last backward pass and the update."""
    zero = engine.optimizer
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
            yield name, zero.get_local_fp32_grad_for_param(parameter)
        elif isinstance(zero, DeepSpeedZeroOptimizer | BF16_Optimizer):
            if (link := parameter._hp_mapping) is not None:
                run = link.get_lp_grad_fragment(parameter._index_in_param_group)
                mine = link.lp_fragment_address
                # bf16 keeps whole gradients on every rank.
                yield name, run if run.numel() == mine.numel else run.flatten()[mine.start : mine.start + mine.numel]
        elif parameter.grad is not None:
            yield name, parameter.grad


def by_layer(norms: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The norms of each layer's parameters together: of layers.07, embed, head, shared."""
    squares: dict[str, tuple[float, float]] = {}
    for name, (parameter, gradient) in norms.items():
        first, second, *_ = name.split(".")
        layer = f"{first}.{second}" if first == "layers" else first
        before = squares.get(layer, (0.0, 0.0))
        squares[layer] = (before[0] + parameter**2, before[1] + gradient**2)
    return {layer: (math.sqrt(a), math.sqrt(b)) for layer, (a, b) in squares.items()}


def generator_states() -> dict[str, Tensor]:
    """Of this process, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def generator_texts(states: Mapping[str, Tensor]) -> dict[str, str]:
    """For JSON, as a checkpoint has them too: base64."""
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def set_generators(texts: Mapping[str, str]) -> None:
    """Set this process's generators to those kept of a rank."""
    for device, text in texts.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


def _square(run: Tensor) -> float:
    return torch.linalg.vector_norm(run.detach(), dtype=torch.float64).item() ** 2


def _named(pair: tuple[float, float]) -> dict[str, float | str]:
    return {"norm": _number(pair[0]), "gradient_norm": _number(pair[1])}


def _number(value: float) -> float | str:
    """JSON has no infinity and no NaN: they are words."""
    return value if math.isfinite(value) else str(value)
