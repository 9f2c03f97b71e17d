"""The same training whatever DeepSpeed does with it: against a plain PyTorch loop, for every ZeRO stage, one rank and
two, and every way of cutting the global batch.

AdamW alone would hide a wrong scale of the gradient, so gradient norms are compared, one case uses SGD and one clips.
"""

import math
from functools import cache

import pytest
import torch
import torch.distributed
from gpt_runs import ADAMW, GLOBAL_BATCH, SGD, STEPS, configuration, micro_batches, plan_of, sample, start_engine

from megaresid.model.gpt import build
from megaresid.training.schedule import learning_rate


def train_under_deepspeed(tree: dict, options: dict, folder: str) -> list[tuple[float, float]]:
    """Runs on every rank: (loss over the global batch, gradient norm) of each step."""
    config = configuration(**options)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine = start_engine(config, tree, folder)
    source, found = micro_batches(config, engine.batch, rank), []
    for step in range(STEPS):
        result = engine.train_step(source, learning_rate(step, STEPS, config.optimizer))
        loss = result.loss.clone()
        torch.distributed.all_reduce(loss)
        found.append((loss.item() / ranks, result.gradient_norm))
    engine.deepspeed.destroy()
    return found


def train_plainly(optimizer: str, options: dict) -> list[tuple[float, float]]:
    """The definition: whole batches, full logits, PyTorch's own loss, clipping and optimizer."""
    config = configuration(**options)
    plan = plan_of(config)
    model = build(plan, config.run.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    decay = config.optimizer.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    if optimizer == "AdamW":
        stepper = torch.optim.AdamW(groups, lr=0.0, betas=config.optimizer.betas)
    else:
        stepper = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    found = []
    for step in range(STEPS):
        tokens = torch.stack([sample(step * GLOBAL_BATCH + j, config.shape.context) for j in range(GLOBAL_BATCH)])
        logits, _ = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip or math.inf)
        for group in stepper.param_groups:
            group["lr"] = learning_rate(step, STEPS, config.optimizer)
        stepper.step()
        stepper.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


CASES = {
    "adamw": (ADAMW, {}),
    "sgd": (SGD, {"learning_rate": 0.2}),
    "sgd clipped": (SGD, {"learning_rate": 0.2, "clip": 0.3}),
}
CUTS = {"adamw": [(1, 8), (1, 1), (2, 4), (2, 1)], "sgd": [(2, 1)], "sgd clipped": [(1, 8), (2, 1)]}


@cache
def definition(name: str) -> list[tuple[float, float]]:
    optimizer, options = CASES[name]
    expected = train_plainly(optimizer["type"], options)
    assert expected[-1][0] < 0.7 * expected[0][0], "little is learned: the comparison would show little"
    if "clip" in options:
        assert all(norm > options["clip"] for _, norm in expected), "clipping is not active"
    return expected


QUICK = {("adamw", 2, 1, stage) for stage in range(4)}
QUICK |= {("sgd", 2, 1, 3), ("sgd clipped", 1, 8, 0), ("sgd clipped", 2, 1, 2)}
EVERY = [(name, *cut, stage) for name in CASES for cut in CUTS[name] for stage in range(4)]


@pytest.mark.parametrize(
    "name, ranks, micro, stage",
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.full]) for case in EVERY],
)
def test_losses_and_gradient_norms_are_the_plain_loops(name, ranks, micro, stage, request, tmp_path):
    optimizer, options = CASES[name]
    tree = {"optimizer": optimizer, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    pool = request.getfixturevalue(f"ranks{ranks}")
    for found in pool.run(train_under_deepspeed, tree, {**options, "micro_batch_size": micro}, str(tmp_path)):
        for (loss, norm), (expected_loss, expected_norm) in zip(found, definition(name), strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_compiled_model_trains_the_same(stage, ranks2, tmp_path):
    tree = {"optimizer": ADAMW, "zero_optimization": {"stage": stage}}
    options = {"compile": True, "micro_batch_size": 4}
    for found in ranks2.run(train_under_deepspeed, tree, options, str(tmp_path), timeout=400):
        for (loss, norm), (expected_loss, expected_norm) in zip(found, definition("adamw"), strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-5)


def poisoned(stage: int, folder: str) -> tuple[list[bool], list[float], bool, int]:
    """Runs on every rank: three steps, the second with gradients that are not finite."""
    config = configuration(micro_batch_size=4)
    engine = start_engine(config, {"optimizer": ADAMW, "zero_optimization": {"stage": stage}}, folder)
    source = micro_batches(config, engine.batch, torch.distributed.get_rank())
    backward, results, losses = engine.deepspeed.backward, [], []
    probe = next(iter(micro_batches(config, engine.batch, 0)))
    for step in range(3):
        engine.deepspeed.backward = (lambda loss: backward(loss * float("inf"))) if step == 1 else backward
        results.append(engine.train_step(source, 1e-2))
        losses.append(engine.loss(*probe).item())
    count = engine.deepspeed.skipped_steps
    engine.deepspeed.destroy()
    finite = [math.isfinite(result.gradient_norm) for result in results]
    return [result.skipped for result in results], losses, finite[0] and finite[2], count


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_update_that_is_not_finite_is_skipped_and_counted_on_all_ranks(stage, ranks2, tmp_path):
    for skipped, losses, finite, count in ranks2.run(poisoned, stage, str(tmp_path)):
        assert skipped == [False, True, False] and count == 1 and finite
        assert losses[1] == losses[0] and losses[2] != losses[1] and math.isfinite(losses[2])
