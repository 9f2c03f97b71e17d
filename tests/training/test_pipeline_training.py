"""A model in two pipeline stages trains as the plain engine does: losses, norms over all stages, clipping, refused
updates, and evaluation of every rank's own micro-batch."""

import gc
import itertools
import json
import math
import os

import pytest
import torch
from gpt_runs import ADAMW, SGD, configuration, micro_batches, plan_of, start_engine

from megaresid.config import from_flat
from megaresid.errors import UserError
from megaresid.model.flops import forward_flops_per_token
from megaresid.model.pipeline import check_pipeline, describe_stages, stage_bounds
from megaresid.model.plan import ModelPlan
from megaresid.training.ds_config import DeepSpeedConfig, data_parallel_ranks, plan_batch, resolve
from megaresid.training.estimate import memory_per_rank, print_estimate

TIED = "embed.tokens.weight"
HYBRID = {"attention": "gated_delta_net + softmax"}
CASES = {
    "vanilla": {},
    "dense_former": {"residual": "dense_former"},
    "hyper_connections": {"residual": "hyper_connections"},
    "hybrid": HYBRID,
}


def tree_of(stage: int, optimizer: dict) -> dict:
    return {"optimizer": optimizer, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}


def course(options: dict, stage: int, optimizer: dict, folder: str, steps: int = 6):
    """Runs on every rank: (loss of the global batch, norm) of each step, and this rank's parameters at the end."""
    config = configuration(layers=4, micro_batch_size=2, **options)
    engine = start_engine(config, tree_of(stage, optimizer), folder)
    source = micro_batches(config, engine.batch, engine.data_rank)
    results = [engine.train_step(source, config.optimizer.learning_rate) for _ in range(steps)]
    parameters = {name: p.detach().clone() for name, p in engine.parameters.items()}
    engine.deepspeed.destroy()
    return [(result.mean_loss, result.gradient_norm) for result in results], parameters


@pytest.mark.parametrize(
    "name, stage, optimizer, clip",
    [
        ("vanilla", 0, SGD, 1.0),  # SGD shows a wrong scale of gradients, and clipping one of the norm
        ("vanilla", 1, SGD, 1.0),
        ("dense_former", 1, ADAMW, 0.0),
        ("hyper_connections", 0, ADAMW, 1.0),
        ("hybrid", 1, SGD, 1.0),
    ],
)
def test_two_stages_train_as_the_plain_engine(name, stage, optimizer, clip, ranks2, tmp_path):
    options = CASES[name] | {"clip": clip}
    (plain, _), _ = ranks2.run(course, options, stage, optimizer, str(tmp_path))
    (first, of_first), (second, of_second) = ranks2.run(
        course, options | {"pipeline_stages": 2}, stage, optimizer, str(tmp_path)
    )
    assert first == second
    if clip:
        assert min(norm for _, norm in plain) > clip, "no step was clipped"
    for (loss, norm), (expected_loss, expected_norm) in zip(first, plain, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert of_first.keys() & of_second.keys() == {TIED}
    assert torch.equal(of_first[TIED], of_second[TIED])


def one_refused_step(options: dict, stage: int, bad_stage: int, folder: str):
    """Runs on every rank: a NaN in one stage's gradient at the second of three steps."""
    config = configuration(layers=4, micro_batch_size=2, **options)
    engine = start_engine(config, tree_of(stage, ADAMW), folder)
    source = micro_batches(config, engine.batch, engine.data_rank)
    results = [engine.train_step(source, 0.01)]
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    name = f"layers.{3 * bad_stage:02d}.mlp.fc.weight"
    hook = engine.parameters[name].register_hook(lambda g: g * math.nan) if name in engine.parameters else None
    results.append(engine.train_step(source, 0.01))
    same = all(torch.equal(before[name], p) for name, p in engine.parameters.items())
    if hook:
        hook.remove()
    results.append(engine.train_step(source, 0.01))
    changed = all(not torch.equal(before[name], p) for name, p in engine.parameters.items() if "k_proj.b" not in name)
    counted = engine.deepspeed.skipped_steps
    engine.deepspeed.destroy()
    return hook is not None, same, changed, counted, [(r.mean_loss, r.gradient_norm, r.skipped) for r in results]


@pytest.mark.parametrize("stage, bad_stage", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_gradient_that_is_not_finite_in_one_stage_stops_the_update_of_all(stage, bad_stage, ranks2, tmp_path):
    found = ranks2.run(one_refused_step, {"pipeline_stages": 2}, stage, bad_stage, str(tmp_path))
    assert [planted for planted, *_ in found] == [bad_stage == 0, bad_stage == 1]
    for _, same, changed, counted, results in found:
        assert same and changed and counted == 1
        assert results == found[0][4]
        assert [skipped for *_, skipped in results] == [False, True, False]
        assert results[1][1] == math.inf and math.isfinite(results[1][0])


def left_behind(options: dict, stage: int, folder: str) -> list[tuple[int, int]]:
    """Runs on every rank: (process groups, threads) after each of three engines, one behind the other."""
    counts = []
    for _ in range(3):
        config = configuration(layers=4, micro_batch_size=2, **options)
        engine = start_engine(config, tree_of(stage, ADAMW), folder)
        engine.train_step(micro_batches(config, engine.batch, engine.data_rank), 0.01)
        engine.deepspeed.destroy()
        del engine
        gc.collect()
        counts.append((len(torch.distributed.distributed_c10d._world.pg_map), len(os.listdir("/proc/self/task"))))
    return counts


@pytest.mark.parametrize("stage", [0, 1])
def test_an_engine_that_is_destroyed_leaves_no_group_and_no_thread(stage, ranks2, tmp_path):
    """What is made once and kept for later engines is there after the first one."""
    for first, second, third in ranks2.run(left_behind, {"pipeline_stages": 2}, stage, str(tmp_path)):
        assert first == second == third


def texts(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of another shape on each rank, with targets that are not wanted."""
    generator = torch.Generator().manual_seed(rank)
    idx = torch.randint(300, (2 + rank, 24 - 5 * rank), generator=generator)
    targets = torch.randint(300, idx.shape, generator=generator)
    targets[0, : 3 + rank] = -1
    return idx, targets


def evaluated(options: dict, folder: str):
    """Runs on every rank: loss and scores of its own text, scores of several targets a position, what a text beyond the
    context gives, and the losses of training before and behind."""
    config = configuration(layers=4, micro_batch_size=2, dropout=0.1, **options)
    engine = start_engine(config, tree_of(0, ADAMW), folder)
    rank = torch.distributed.get_rank()
    idx, targets = texts(rank)
    found = [engine.loss(idx, targets), *engine.score(idx, targets)]
    found += engine.score(idx, torch.stack([targets, targets.flip(0)], 2))
    refusal = None
    if "pipeline_stages" in options:
        short_or_long = torch.zeros(1, 25 if rank else 3, dtype=torch.int64)
        try:
            engine.score(short_or_long, short_or_long)
        except ValueError as error:
            refusal = str(error)
    training = engine.deepspeed.module.training
    source = micro_batches(config, engine.batch, engine.data_rank)
    torch.manual_seed(rank)
    losses = [engine.train_step(source, 0.01).mean_loss for _ in range(3)]
    engine.deepspeed.destroy()
    engine = start_engine(config, tree_of(0, ADAMW), folder)
    source = micro_batches(config, engine.batch, engine.data_rank)
    torch.manual_seed(rank)
    unevaluated = [engine.train_step(source, 0.01).mean_loss for _ in range(3)]
    engine.deepspeed.destroy()
    return found, refusal, training, losses, unevaluated


@pytest.mark.parametrize("name", ["dense_former"])
def test_every_ranks_own_text_is_evaluated_as_by_the_plain_engine(name, ranks2, tmp_path):
    plain = ranks2.run(evaluated, CASES[name], str(tmp_path))
    stages = ranks2.run(evaluated, CASES[name] | {"pipeline_stages": 2}, str(tmp_path))
    for rank, ((expected, *_), (found, refusal, training, losses, unevaluated)) in enumerate(zip(plain, stages)):
        for value, wanted in zip(found, expected, strict=True):
            assert value.dtype == wanted.dtype and value.shape == wanted.shape
            torch.testing.assert_close(value, wanted, atol=2e-6, rtol=0)
        assert "25 tokens" in refusal, rank
        assert training and losses == unevaluated  # bitwise, with dropout


@pytest.mark.parametrize("residual, attention", [("vanilla", "softmax"), ("dense_former", "softmax + gated_delta_net")])
@pytest.mark.parametrize("layers, stages", [(5, 1), (5, 2), (6, 3), (4, 4), (12, 3)])
def test_layers_are_shared_out_so_that_the_dearest_stage_is_cheapest(residual, attention, layers, stages):
    def plan_with(layers: int) -> ModelPlan:
        options = {"model": "gpt2", "layers": layers, "width": 768, "residual": residual, "attention": attention}
        return from_flat(options, "test").plan()

    # A layer's cost, independently: what the model with it costs more than the model without.
    flops = [sum(forward_flops_per_token(plan_with(n)).values()) for n in range(1, layers + 1)]
    head = forward_flops_per_token(plan_with(1))["head"]
    cost = [flops[0] - head] + [b - a for a, b in itertools.pairwise(flops)]
    cost[-1] += head

    def dearest(cuts: tuple[int, ...]) -> int:
        return max(sum(cost[a:b]) for a, b in itertools.pairwise((0, *cuts, layers)))

    bounds = stage_bounds(plan_with(layers), stages)
    assert bounds[0] == 0 and bounds[-1] == layers + 4 and len(bounds) == stages + 1
    found = tuple(bound - 2 for bound in bounds[1:-1])
    assert all(a < b for a, b in itertools.pairwise((0, *found, layers)))
    best = min(dearest(cuts) for cuts in itertools.combinations(range(1, layers), stages - 1))
    assert dearest(found) <= best * 1.01  # the close's cost is not told apart from the last layer's


def weights_held(folder: str) -> int:
    config = configuration(layers=4, pipeline_stages=2)
    engine = start_engine(config, tree_of(0, ADAMW), folder)
    held = sum(p.numel() * p.element_size() for p in engine.parameters.values())
    engine.deepspeed.destroy()
    return held


def test_memory_is_that_of_the_largest_stage(ranks2, tmp_path):
    held = ranks2.run(weights_held, str(tmp_path))
    config = configuration(layers=4, pipeline_stages=2)
    batch = plan_batch(config, 1)
    settings = DeepSpeedConfig(tree_of(0, ADAMW), {})
    promised = memory_per_rank(plan_of(config), config, settings, batch)
    assert promised["weights"] == max(held) and promised["optimizer"] == 2 * max(held)
    whole = memory_per_rank(plan_of(config), configuration(layers=4), settings, batch)
    assert whole["saved activations"] / 2 <= promised["saved activations"] <= 2 * whole["saved activations"]


def test_stages_are_told_before_the_start(capsys, tmp_path):
    config = configuration(layers=4, pipeline_stages=2)
    bounds = stage_bounds(plan_of(config), 2)
    path = tmp_path / "deepspeed.json"
    path.write_text('{"optimizer": {"type": "AdamW", "params": {}}}')
    batch = plan_batch(config, data_parallel_ranks(config, 4))
    print_estimate(plan_of(config), config, resolve(path, config, batch), batch, 1000)
    told = capsys.readouterr().out
    lines = describe_stages(plan_of(config), 2)
    assert all(line in told for line in lines)
    cut = bounds[1] - 2
    assert lines[0].startswith("stage 0 of 2: embedding, layer") and lines[1].endswith("copy of the embedding")
    assert (f"to {cut - 1}" in lines[0] or f"layer {cut - 1}" in lines[0]) and f" {cut}" in lines[1]
    assert "x 2 ranks" in told


@pytest.mark.parametrize(
    "tree, options, told",
    [
        ({"zero_optimization": {"stage": 2}}, {}, "takes ZeRO 0 or 1"),
        ({"zero_optimization": {"stage": 3}}, {}, "takes ZeRO 0 or 1"),
        ({}, {"compile": True}, "--compile"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, {}, "torch_autocast"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, {}, "overlap_comm"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, {}, "offload_optimizer"),
    ],
)
def test_what_stages_cannot_do_is_refused_before_the_start(tree, options, told, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"optimizer": ADAMW} | tree))
    config = configuration(pipeline_stages=2, **options)
    with pytest.raises(UserError, match=told) as refused:
        resolve(path, config, plan_batch(config, 1))
    assert "--pipeline-stages 2" in str(refused.value)


def test_stages_must_fit_the_ranks_and_the_layers():
    with pytest.raises(UserError, match="--pipeline-stages 3 does not divide the 4 ranks"):
        data_parallel_ranks(configuration(pipeline_stages=3), 4)
    assert data_parallel_ranks(configuration(pipeline_stages=2), 4) == 2
    with pytest.raises(UserError, match="--pipeline-stages 3: the model has 2 layers"):
        check_pipeline(plan_of(configuration()), 3)
