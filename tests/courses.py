"""Short trainings of small models under DeepSpeed's engines, beside the plain loop that defines them.

In fp32, away from initialisation, with SGD: AdamW hides a wrong scale of a gradient, and makes steps of the rounding in
one that is zero.
"""

import functools
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from small_models import SHAPE, Case, model_of, move_away

from megaresid.config import RunConfig, from_flat
from megaresid.model.gpt import GPT, canonical_parameters, canonical_rules, layer_specs, set_step
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape
from megaresid.training.checkpoint import load_checkpoint, read_parameters, save_checkpoint
from megaresid.training.ds_config import plan_batch, resolve
from megaresid.training.engine import Engine
from megaresid.training.pipeline_engine import PipelineEngine

STEPS, STOP, GLOBAL_BATCH, DECAY = 5, 2, 4, 0.1
SGD = {"type": "SGD", "params": {"momentum": 0.9}}
ADAMW = {"type": "AdamW", "params": {"torch_adam": True}}

Course = list[tuple[float, float]]
"""Of each step, the loss over the global batch and the norm of its gradient."""


def shape_of(case: Case) -> ModelShape:
    return SHAPE.model_copy(update={"layers": case.layers})


def model_to_train(case: Case) -> GPT:
    return model_of(case.residual, shape_of(case), away=case.away, dtype=torch.float32, attention=case.attention)


def configuration(case: Case, **options) -> RunConfig:
    shape = {"model": "tiny", "layers": case.layers, "heads": SHAPE.heads, "width": SHAPE.width}
    batch = {"context": SHAPE.context, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2}
    optimizer = {"learning_rate": case.rate, "min_learning_rate": 0.0, "weight_decay": DECAY, "clip": 0.0}
    return from_flat(shape | batch | optimizer | {"steps": STEPS} | options, "test")


def tokens(step: int) -> torch.Tensor:
    """The global batch of a step [GLOBAL_BATCH, context + 1]."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(SHAPE.vocab_size, (GLOBAL_BATCH, SHAPE.context + 1), generator=generator)


def micro_batches(rows: slice, first: int, micro: int = GLOBAL_BATCH):
    """Those ``rows`` of every step's batch, ``micro`` at once at most, from step ``first`` on."""
    for step in range(first, STEPS):
        for idx in tokens(step)[rows].split(micro):
            yield idx[:, :-1], idx[:, 1:]


@functools.cache
def plain_course(case: Case, dtype: torch.dtype = torch.float32) -> Course:
    """The definition: full logits, PyTorch's own loss and SGD, and the rules of each parameter by itself."""
    model = model_to_train(case).to(dtype)
    rules = canonical_rules(model, model.prefixes, model.plan)
    stepper = torch.optim.SGD(
        [
            {
                "params": [parameter],
                "lr": case.rate * rules[name].lr_multiplier,
                "weight_decay": DECAY if rules[name].decay else 0.0,
            }
            for name, parameter in canonical_parameters(model, model.prefixes).items()
        ],
        momentum=0.9,
    )
    course = []
    for step in range(STEPS):
        set_step(model, case.step + step)
        idx = tokens(step)
        loss = torch.nn.functional.cross_entropy(model(idx[:, :-1])[0].flatten(0, 1), idx[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        stepper.step()
        stepper.zero_grad()
        course.append((loss.item(), norm.item()))
    return course


def assert_same_course(found: Course, case: Case) -> None:
    """Losses to 1e-4 and norms of gradients to 1e-5, in the first step whatever happens; in a later one they may be as
    far apart as ten times what rounding alone has made of the plain loop by then. A mixer's norm of an output that is
    nearly zero magnifies it."""
    courses = zip(found, plain_course(case), plain_course(case, torch.float64), strict=True)
    for step, (given, expected, exact) in enumerate(courses):
        for value, wanted, true, tolerance in zip(given, expected, exact, (1e-4, 1e-5)):
            rounding = 10 * abs(wanted - true) if step else 0
            assert value == pytest.approx(wanted, rel=tolerance, abs=rounding), f"step {step}"


def start_engine(
    case: Case, stage: int, folder: str, optimizer: dict = SGD, sections: dict | None = None, **options
) -> Engine:
    """On every rank, an engine whose model is away from initialisation; ZeRO-3 cuts up small parameters too.
    ``sections`` are further ones of DeepSpeed's JSON."""
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    path = Path(folder) / f"rank{dist.get_rank()}.json"
    tree = {"optimizer": optimizer, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    tree |= sections or {}
    path.write_text(json.dumps(tree))
    config = configuration(case, **options)
    batch = plan_batch(config, dist.get_world_size())
    model = model_to_train(case)
    with mock.patch("megaresid.training.engine.build", lambda *_: model):
        return Engine(model.plan, config, resolve(path, config, batch), batch)


def run_steps(engine: Engine, case: Case, first: int, last: int) -> Course:
    """(This rank's loss, gradient norm) of steps [first, last)."""
    share, rank, course = GLOBAL_BATCH // engine.batch.ranks, engine.data_rank, []
    source = micro_batches(slice(share * rank, share * (rank + 1)), first, engine.batch.micro)
    for step in range(first, last):
        engine.set_step(case.step + step)
        result = engine.train_step(source, case.rate)
        course.append((result.loss.item(), result.gradient_norm))
    return course


def save(engine: Engine, folder: str, step: int) -> Path:
    return save_checkpoint(engine.deepspeed, engine.parameters, Path(folder), step=step, counters={}, identity={})


def train_under_zero(case: Case, stage: int, folder: str) -> Course:
    """Runs on every rank."""
    engine = start_engine(case, stage, folder)
    if stage == 3:
        assert not any(p.numel() for p in engine.parameters.values()), "a parameter is whole"
    course = run_steps(engine, case, 0, STEPS)
    engine.deepspeed.destroy()
    return course


def train_and_resume(case: Case, stage: int, optimizer: dict, folder: str):
    """Runs on every rank: the course of an uninterrupted run, of what a second engine makes of its checkpoint, and the
    parameters at the end of both."""
    engine = start_engine(case, stage, folder, optimizer)
    course = run_steps(engine, case, 0, STOP)
    stopped = save(engine, f"{folder}/whole", STOP)
    course += run_steps(engine, case, STOP, STEPS)
    end = read_parameters(save(engine, f"{folder}/whole", STEPS))
    engine.deepspeed.destroy()
    engine = start_engine(case, stage, folder, optimizer)
    load_checkpoint(engine.deepspeed, engine.parameters, stopped)
    resumed = run_steps(engine, case, STOP, STEPS)
    resumed_end = read_parameters(save(engine, f"{folder}/resumed", STEPS))
    engine.deepspeed.destroy()
    return course, resumed, end, resumed_end


def mean_over_ranks(first: Course, second: Course) -> Course:
    return [((a + b) / 2, norm) for (a, norm), (b, _) in zip(first, second, strict=True)]


def assert_resumes_bitwise(of_ranks) -> None:
    for course, resumed, end, resumed_end in of_ranks:
        assert resumed == course[STOP:]
        assert end.keys() == resumed_end.keys()
        for name, parameter in end.items():
            assert torch.equal(parameter, resumed_end[name]), name


def train_in_two_stages(case: Case, cut: int) -> Course:
    """Runs on every rank, one stage each: the second begins at part ``cut`` of the model."""
    plan = ModelPlan(shape_of(case), case.attention, case.residual)
    config = configuration(case, pipeline_stages=2, seed=0)
    batch = plan_batch(config, 1)
    bounds = [0, cut, len(layer_specs(plan))]
    with TemporaryDirectory() as folder, mock.patch("megaresid.model.pipeline.stage_bounds", lambda *_: bounds):
        path = Path(folder) / "deepspeed.json"
        path.write_text(json.dumps({"optimizer": SGD}))
        engine = PipelineEngine(plan, config, resolve(path, config, batch), batch)
    move_away(engine.parameters, case.away, SHAPE.vocab_size)
    course = run_steps(engine, case, 0, STEPS)
    engine.deepspeed.destroy()
    return course


def assert_pipeline_trains(case: Case, cut: int, ranks) -> None:
    first, second = ranks.run(train_in_two_stages, case, cut)
    assert first == second
    assert_same_course(first, case)
