"""A live engine's tasks give what lm-evaluation-harness's own HFLM gives of the exported model.

Its class for Hugging Face models is the definition here: log-likelihoods to 1e-4, predictions but for close calls.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from task_data import task_folder

from megaresid.config import RunConfig, from_flat

TASKS = ("arc_easy", "hellaswag", "piqa", "winogrande", "lambada_openai", "wikitext")
TOLERANCE = 1e-4
RESOLUTION = 2**-22
"""HFLM adds up in fp32: at the 1,400 nats of a window its neighbours are 1.2e-4 apart already."""
STEPS = 3

Ids = tuple[tuple[int, ...], tuple[int, ...]]
Scores = dict[tuple[str, str] | Ids, tuple[Ids, float, bool]]
"""(context, continuation) -> the ids of both, log-probability, greedy; a window of a page is known by its ids."""


def configuration(context: int) -> RunConfig:
    shape = {"model": "tiny", "layers": 2, "heads": 2, "width": 32, "context": context}
    batch = {"global_batch_size": 4, "micro_batch_size": 2, "steps": STEPS, "learning_rate": 0.01}
    return from_flat(shape | batch | {"run_dir": "run", "data": ["data"]}, "test")


def evaluated_live(stage: int, context: int, data: str, folder: str) -> tuple[dict[str, float], Scores]:
    """Runs on every rank: train a few steps, leave a run directory in ``folder``, and run the hook of the tasks."""
    from megaresid.evaluation.chosen import hooks, parse
    from megaresid.evaluation.harness_model import HarnessModel
    from megaresid.training.checkpoint import save_checkpoint
    from megaresid.training.ds_config import plan_batch, resolve
    from megaresid.training.engine import Engine
    from megaresid.training.run_dir import write_json

    config, rank = configuration(context), dist.get_rank()
    path = Path(folder) / f"rank{rank}.json"
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    adamw = {"type": "AdamW", "params": {"torch_adam": True}}
    path.write_text(json.dumps({"optimizer": adamw, "zero_optimization": zero}))
    batch = plan_batch(config, dist.get_world_size())
    engine = Engine(config.plan(), config, resolve(path, config, batch), batch)
    if stage == 3:
        assert not any(parameter.numel() for parameter in engine.parameters.values()), "a parameter is whole"
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        drawn = torch.randint(50257, (batch.accumulation, 2, context + 1), generator=generator) % 97
        engine.train_step([(ids[:, :-1], ids[:, 1:]) for ids in drawn], 0.01)
    if rank == 0:
        write_json(Path(folder) / "config.json", {"schema": 1, **config.flat()})
    identity = {"spec": config.plan().hash}
    save_checkpoint(
        engine.deepspeed, engine.parameters, Path(folder) / "checkpoints", step=STEPS, counters={}, identity=identity
    )
    (hook,) = hooks(parse(",".join(TASKS) + "@end"), Path(data), lambda: None)
    with recorded(HarnessModel) as scores:
        numbers = hook.measure(engine)
    engine.deepspeed.destroy()
    return numbers, scores


@contextmanager
def recorded(model_class: type) -> Iterator[Scores]:
    """The scores that a class of lm-evaluation-harness gives while the block runs."""
    scores: Scores = {}
    original = model_class._loglikelihood_tokens

    def recording(self, requests, *args, **options):
        found = original(self, requests, *args, **options)
        for (texts, context, continuation), score in zip(requests, found, strict=True):
            ids = tuple(context), tuple(continuation)
            scores[texts or ids] = ids, *score
        return found

    with mock.patch.object(model_class, "_loglikelihood_tokens", recording):
        yield scores


def evaluated_by_hflm(exported: Path, data: Path) -> tuple[dict, Scores]:
    """lm-evaluation-harness's own evaluation of a folder in Hugging Face's form."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from data_prep.tokenizer import gpt2_encoding
    from megaresid.evaluation.tasks import tasks

    built = tasks(TASKS, data, gpt2_encoding())
    model = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=8)
    with recorded(HFLM) as scores:
        return evaluate(model, built.loaded, bootstrap_iters=0, log_samples=True), scores


def choices_of(task: str, sample: dict, scores: Scores) -> dict[str, list[float]]:
    """Of one document, what its choices are compared by: for ``acc`` and for ``acc_norm``."""
    found = [scores[tuple(arguments)][1] for arguments in sample["arguments"]]
    if task == "winogrande":  # the choices are the contexts
        return {"acc": found}
    # A choice's length in characters, without the blank before it.
    return {"acc": found, "acc_norm": [p / (len(a[1]) - 1) for p, a in zip(found, sample["arguments"], strict=True)]}


def close_calls(task: str, metric: str, samples: list[dict], ours: Scores, theirs: Scores) -> list[str]:
    """The documents that the two answer otherwise; fails for one whose best choices are not within the tolerance."""
    close = []
    for sample in samples:
        mine, other = (choices_of(task, sample, scores)[metric] for scores in (ours, theirs))
        if mine.index(max(mine)) != other.index(max(other)):
            best, second = sorted(other, reverse=True)[:2]
            close.append(f"{task}/{metric}, document {sample['doc_id']}: margin {best - second:.2g}")
            assert best - second < TOLERANCE, close
    return close


def assert_parity(numbers: dict[str, float], ours: Scores, results: dict, theirs: Scores) -> None:
    assert ours.keys() == theirs.keys()
    for key, (ids, log_p, greedy) in theirs.items():
        assert ours[key][0] == ids, "other tokens are scored"
        assert ours[key][1] == pytest.approx(log_p, abs=TOLERANCE, rel=RESOLUTION)
        assert ours[key][2] == greedy
    names = {name.split("/")[0] for name in numbers}
    assert names == set(TASKS)
    for task in TASKS:
        samples = results["samples"][task]
        for key, value in results["results"][task].items():
            metric, _, _ = key.partition(",")
            if not isinstance(value, float):
                continue
            if metric in ("acc", "acc_norm") and task != "lambada_openai":
                close = close_calls(task, metric, samples, ours, theirs)
                assert abs(numbers[f"{task}/{metric}"] - value) * len(samples) < len(close) + 1e-9, close
            else:
                assert numbers[f"{task}/{metric}"] == pytest.approx(value, rel=TOLERANCE)


def check_parity(pool, stage: int, items: int, context: int, folder: Path) -> None:
    from megaresid.exchange.write import write_exported

    for name in ("data", "run"):
        (folder / name).mkdir()
    data = task_folder(folder / "data", items)
    answers = pool.run(evaluated_live, stage, context, str(data), str(folder / "run"), timeout=600)
    numbers, ours = answers[0]
    assert all(answer == answers[0] for answer in answers), "the ranks disagree"
    write_exported(folder / "run", "hf", folder / "exported", None, say=lambda line: None)
    assert_parity(numbers, ours, *evaluated_by_hflm(folder / "exported", data))


@pytest.mark.parametrize(
    "ranks, stage", [(1, 1), (2, 3), *(pytest.param(*case, marks=pytest.mark.full) for case in [(1, 3), (2, 1)])]
)
def test_live_scores_are_hflms(request, tmp_path, ranks, stage):
    check_parity(request.getfixturevalue(f"ranks{ranks}"), stage, items=12, context=128, folder=tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_live_scores_are_hflms_of_more_items(request, tmp_path, ranks, stage):
    """HFLM itself takes no continuation that is longer than the context."""
    check_parity(request.getfixturevalue(f"ranks{ranks}"), stage, items=100, context=256, folder=tmp_path)
