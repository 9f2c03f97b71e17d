"""What a live engine scores is what its weights say, and training goes on as if nothing had been scored."""

import functools
import random
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from courses import ADAMW, model_to_train, run_steps, save, start_engine
from small_models import SHAPE, Case

from megaresid.evaluation.loaded import LoadedModel
from megaresid.evaluation.scoring import Request, score
from megaresid.training.checkpoint import read_parameters

STAGES = [pytest.param(stage, id=f"zero{stage}") for stage in range(4)]
VANILLA = Case("vanilla", "softmax", layers=2, step=0)
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
BF16 = {"bf16": {"enabled": True}}


def batches(rank: int):
    """(idx, targets) of lengths from 1 to the context, other ones on each rank, the last with nothing to do."""
    generator = torch.Generator().manual_seed(rank)
    for rows, length in [(1, 1), (3, SHAPE.context), (2, 5 + rank), (1 + rank, 3)]:
        idx = torch.randint(SHAPE.vocab_size, (rows, length), generator=generator)
        yield idx, torch.randint(-SHAPE.vocab_size, SHAPE.vocab_size, idx.shape, generator=generator)
    yield torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), -1)


def definition(model, idx, targets):
    """From all logits in fp64."""
    with torch.no_grad():
        logits = model(idx)[0]
    wanted = targets >= 0
    log_p = torch.log_softmax(logits.double(), -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return log_p[wanted], (logits.argmax(-1) == targets)[wanted]


def assert_scored(engine, model, rank: int) -> None:
    for idx, targets in batches(rank):
        log_p, greedy = engine.score(idx, targets)
        expected, likeliest = definition(model, idx, targets)
        assert log_p.dtype == torch.float32
        torch.testing.assert_close(log_p.double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(greedy, likeliest)


def train_and_score(stage: int, folder: str):
    """Runs on every rank: the course and the last parameters of a run that scores before, between and after its steps,
    and of one that does not. With dropout, and layers that run again for the backward pass."""
    found, rank, model = [], dist.get_rank(), model_to_train(VANILLA).double().eval()
    for scoring in (True, False):
        engine, course = start_engine(VANILLA, stage, folder), []
        for module in engine.deepspeed.module.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.2
            if hasattr(module, "recompute"):
                module.recompute = True
        torch.manual_seed(rank)
        if scoring:
            assert_scored(engine, model, rank)
        for step in range(3):
            course += run_steps(engine, VANILLA, step, step + 1)
            for idx, targets in batches(rank) if scoring else ():
                engine.score(idx, targets)
                assert engine.deepspeed.module.training
        found.append((course, read_parameters(save(engine, f"{folder}/{scoring}", 3))))
        engine.deepspeed.destroy()
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_scores_as_its_weights_say_and_trains_on_bitwise(stage, ranks2, tmp_path):
    for (course, end), (unscored, unscored_end) in ranks2.run(train_and_score, stage, str(tmp_path)):
        assert course == unscored
        assert end.keys() == unscored_end.keys()
        assert all(torch.equal(end[name], unscored_end[name]) for name in end)


def score_by_requests(stage: int, folder: str):
    """Runs on every rank: the scores of requests by an engine, and by its model whole on every rank."""
    engine = start_engine(VANILLA, stage, folder)
    loaded = LoadedModel(model_to_train(VANILLA), torch.device("cpu"), None, positions_per_forward=11)
    drawn = random.Random(0)

    def tokens(longest):
        return [drawn.randrange(3) for _ in range(drawn.randint(1, longest))]

    requests = [Request(tokens(9), tokens(5)) for _ in range(40)]
    found = score(engine, requests), score(loaded, requests), loaded.loss(*next(batches(0))).item()
    engine.deepspeed.destroy()
    return found


@pytest.mark.parametrize("stage", [pytest.param(1, id="zero1"), pytest.param(3, id="zero3")])
def test_engine_and_loaded_model_give_equal_scores_on_all_ranks(stage, ranks1, ranks2, tmp_path):
    alone, *shared = ranks1.run(score_by_requests, stage, str(tmp_path)) + ranks2.run(
        score_by_requests, stage, str(tmp_path)
    )
    assert shared[0] == shared[1]
    for scores in (alone[0], shared[0][0], shared[0][1]):
        for given, expected in zip(scores, alone[1], strict=True):
            assert given.log_probability == pytest.approx(expected.log_probability, abs=1e-5)
            assert given.greedy == expected.greedy


def score_in_bf16(stage: int, folder: str) -> None:
    """Runs on every rank."""
    rank = dist.get_rank()
    for sections, dtype in [(AUTOCAST, torch.float32), (BF16, torch.bfloat16)]:
        engine = start_engine(VANILLA, stage, folder, ADAMW, sections)
        model, plain = model_to_train(VANILLA).to(dtype), model_to_train(VANILLA)
        loaded = LoadedModel(model, torch.device("cpu"), torch.bfloat16 if dtype == torch.float32 else None, 8)
        for idx, targets in batches(rank):
            log_p, greedy = engine.score(idx, targets)
            assert engine.loss(idx, targets).item() == pytest.approx(-log_p.sum().item() / idx.numel(), rel=1e-5)
            if stage < 3:  # which rounds parameters that it gathers from two ranks
                assert all(map(torch.equal, (log_p, greedy), loaded.score(idx, targets)))
            in_fp32 = definition(plain, idx, targets)[0]
            assert not len(log_p) or 1e-5 < (log_p - in_fp32).abs().max() < 0.5, "not in bf16"
        engine.deepspeed.destroy()


@pytest.mark.parametrize("stage", [pytest.param(1, id="zero1"), pytest.param(3, id="zero3", marks=pytest.mark.full)])
def test_scores_are_in_the_runs_precision(stage, ranks2, tmp_path):
    ranks2.run(score_in_bf16, stage, str(tmp_path))


def score_compiled(folder: str):
    """Runs on the one rank: how many graphs there are after a training step, and after scoring and training more; and
    the course of that training."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # The graphs are dynamo's; what runs them is no matter here, and inductor takes a minute.
    compile_eagerly = functools.partial(torch.compile, backend="eager")
    with mock.patch("megaresid.model.compile.torch.compile", compile_eagerly):
        engine = start_engine(VANILLA, 1, folder, sections=AUTOCAST, compile=True)
    plain = LoadedModel(model_to_train(VANILLA), torch.device("cpu"), torch.bfloat16, 8)
    counters, graphs = torch._dynamo.utils.counters, []
    for idx, targets in batches(0):
        found, expected = engine.score(idx, targets), plain.score(idx, targets)
        assert all(map(torch.equal, found, expected))
    for step in range(3):
        run_steps(engine, VANILLA, step, step + 1)
        for idx, targets in batches(0):
            engine.score(idx, targets)
        graphs.append(counters["stats"]["unique_graphs"])
    engine.deepspeed.destroy()
    return graphs


def test_a_compiled_engine_scores_every_length_without_compiling(ranks1, tmp_path):
    (graphs,) = ranks1.run(score_compiled, str(tmp_path))
    assert graphs == [1, 1, 1]


def score_badly(stage: int, folder: str) -> list[str]:
    """Runs on every rank: what is refused; and the engine is in training mode again."""
    engine, told = start_engine(VANILLA, stage, folder), []
    one = torch.zeros(1, 1, dtype=torch.int64)
    for idx, targets in [(torch.zeros(1, SHAPE.context + 1, dtype=torch.int64),) * 2, (one, one[0])]:
        with pytest.raises(ValueError) as caught:
            engine.score(idx, targets)
        told.append(str(caught.value))
        assert engine.deepspeed.module.training and all(m.training for m in engine.deepspeed.module.modules())
    engine.deepspeed.eval()
    engine.score(one, one)
    assert not engine.deepspeed.module.training
    engine.deepspeed.destroy()
    return told


def test_what_cannot_be_scored_is_refused_and_the_mode_is_as_before(ranks1, tmp_path):
    ((too_long, misfit),) = ranks1.run(score_badly, 1, str(tmp_path))
    assert f"sequences of {SHAPE.context + 1} tokens are longer than the model's context of {SHAPE.context}" in too_long
    assert "do not fit" in misfit
