"""Tasks of lm-evaluation-harness: their numbers by definition, where their documents come from, and what is refused."""

import functools
import logging
import math
import os
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_data import BYTES
from measurables import FullLogits, bytes_model
from small_models import SHAPE, model_of
from task_data import made_rows, write_rows

from megaresid.errors import UserError
from megaresid.evaluation import harness_model
from megaresid.evaluation.offline_tasks import OFFLINE
from megaresid.evaluation.tasks import tasks

CONTEXT, ITEMS = 48, 7
ROWS = made_rows(ITEMS)
CHOICE = {
    "arc_easy": "arc_easy_test.jsonl",
    "hellaswag": "hellaswag_val_processed.jsonl",
    "piqa": "piqa_valid.jsonl",
    "winogrande": "winogrande_xl_dev.jsonl",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Made rows: with a token a byte the published ones would all be cut short."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        write_rows(folder / name, rows)
    return folder


@pytest.fixture(scope="module")
def engine() -> FullLogits:
    return FullLogits(bytes_model(CONTEXT), positions_per_forward=4 * CONTEXT)


@pytest.fixture(scope="module")
def built(data):
    return tasks(list(OFFLINE), data, BYTES)


def scored(engine: FullLogits, context: str, continuation: str) -> tuple[float, bool]:
    """The definition, in fp64: of the last CONTEXT + 1 tokens the last is not read; the continuation's are judged."""
    ids = (list(context.encode()) + list(continuation.encode()))[-(CONTEXT + 1) :]
    table = torch.log_softmax(engine.logits(torch.tensor([ids[:-1]]))[0].double(), -1)
    judged = range(max(0, len(ids) - 1 - len(continuation.encode())), len(ids) - 1)
    return sum(table[t, ids[t + 1]].item() for t in judged), all(table[t].argmax() == ids[t + 1] for t in judged)


def prompts(task: str, row: dict) -> tuple[list[tuple[str, str]], list[str], int]:
    """(context, continuation) of each choice, the choices, and the index of the right one."""
    if task == "winogrande":
        before, after = row["sentence"].split("_")
        options = [row["option1"], row["option2"]]
        return [(before + option, " " + after.strip()) for option in options], options, int(row["answer"]) - 1
    if task == "arc_easy":
        question, choices = row["question"], row["choices"]["text"]
        context, right = f"Question: {question}\nAnswer:", row["choices"]["label"].index(row["answerKey"])
    elif task == "hellaswag":
        context, choices, right = row["query"], row["choices"], row["gold"]
    else:
        context, choices, right = f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]
    return [(context, f" {choice}") for choice in choices], choices, right


def likeliest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def test_accuracies_are_those_of_the_likeliest_choices(built, engine):
    numbers = built(engine)
    for task, file in CHOICE.items():
        by_sum, by_character = [], []
        for row in ROWS[file]:
            pairs, choices, right = prompts(task, row)
            found = [scored(engine, *pair)[0] for pair in pairs]
            by_sum.append(likeliest(found) == right)
            by_character.append(likeliest([p / len(c) for p, c in zip(found, choices, strict=True)]) == right)
        for metric, values in {"acc": by_sum, "acc_norm": by_character}.items():
            if (task, metric) != ("winogrande", "acc_norm"):
                assert numbers[f"{task}/{metric}"] == pytest.approx(np.mean(values))
                assert numbers[f"{task}/{metric}_stderr"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(ITEMS))
    assert built.items == dict.fromkeys(CHOICE, ITEMS) | {"lambada_openai": ITEMS, "wikitext": 2}


def test_every_number_has_a_name_and_no_other_has(built, engine):
    expected = {f"{task}/acc{stderr}" for task in (*CHOICE, "lambada_openai") for stderr in ("", "_stderr")}
    expected |= {f"{task}/acc_norm{stderr}" for task in CHOICE if task != "winogrande" for stderr in ("", "_stderr")}
    expected |= {"lambada_openai/perplexity"}
    expected |= {f"wikitext/{name}" for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")}
    assert built(engine).keys() == expected


def test_last_words_and_pages_have_their_perplexities(built, engine):
    numbers = built(engine)
    found = [scored(engine, text.rpartition(" ")[0], " " + text.rpartition(" ")[2]) for text in texts()]
    assert numbers["lambada_openai/perplexity"] == pytest.approx(math.exp(-np.mean([p for p, _ in found])), rel=1e-5)
    assert numbers["lambada_openai/acc"] == np.mean([greedy for _, greedy in found])


def texts() -> list[str]:
    return [row["text"] for row in ROWS["lambada_test.jsonl"]]


@pytest.mark.parametrize("length", [0, 1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 3 * CONTEXT + 5])
def test_a_rolling_text_predicts_each_token_once(engine, length):
    """Windows of CONTEXT inputs after <|endoftext|>; the last one, if shorter, reads as many before its first target as
    fit."""
    from lm_eval.api.instance import Instance

    text = "".join(random.Random(length).choices("abcdef ,.", k=length))
    ids, total = [256, *text.encode()], 0.0
    for start in range(0, length, CONTEXT):
        end = min(start + CONTEXT, length)
        inputs = ids[max(0, end - CONTEXT) if start else 0 : end]
        table = torch.log_softmax(engine.logits(torch.tensor([inputs]))[0].double(), -1)
        total += sum(table[t - end, ids[t + 1]].item() for t in range(start, end))
    model = harness_model.HarnessModel(engine, BYTES)
    found = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)] * 2)
    assert found == pytest.approx([total, total], rel=1e-6)


def test_an_empty_context_is_the_end_of_a_text(engine):
    from lm_eval.api.instance import Instance

    model = harness_model.HarnessModel(engine, BYTES)
    ((found, _),) = model.loglikelihood([Instance("loglikelihood", {}, ("", "word"), 0)])
    ids = [256, *b"word"]
    table = torch.log_softmax(engine.logits(torch.tensor([ids[:-1]]))[0].double(), -1)
    assert found == pytest.approx(sum(table[t, ids[t + 1]].item() for t in range(4)), rel=1e-6)


def test_a_text_that_looks_like_a_special_token_is_a_text(engine):
    assert harness_model.HarnessModel(engine, BYTES).tok_encode("<|endoftext|>") == list(b"<|endoftext|>")


def test_a_second_run_gives_the_same_and_nothing_else_is_changed(built, engine, capfd):
    first = built(engine)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    levels = [logging.getLogger(name).level for name in ("lm_eval", "")]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ)
    capfd.readouterr()
    assert built(engine) == first
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ)
    assert before == after
    assert levels == [logging.getLogger(name).level for name in ("lm_eval", "")]
    assert capfd.readouterr().out == ""


def test_bars_and_standard_errors_of_lm_eval_are_put_back(built, engine):
    import lm_eval.api.task
    import lm_eval.evaluator_utils

    before = lm_eval.api.task.tqdm, lm_eval.evaluator_utils.stderr_for_metric
    built(engine)
    with pytest.raises(ZeroDivisionError):
        built(Broken(bytes_model(CONTEXT), CONTEXT))
    assert before == (lm_eval.api.task.tqdm, lm_eval.evaluator_utils.stderr_for_metric)


class Broken(FullLogits):
    def score(self, idx, targets):
        raise ZeroDivisionError


def test_a_model_of_another_vocabulary_is_refused(built):
    other = FullLogits(model_of("vanilla", SHAPE), CONTEXT)
    with pytest.raises(UserError, match="of 257 ids, and the model predicts 40"):
        built(other)


def test_a_limit_takes_the_first_documents(data, engine):
    built = tasks(["piqa"], data, BYTES, limit=3)
    pairs = [prompts("piqa", row) for row in ROWS["piqa_valid.jsonl"][:3]]
    right = [likeliest([scored(engine, *pair)[0] for pair in found]) == gold for found, _, gold in pairs]
    assert built(engine)["piqa/acc"] == pytest.approx(np.mean(right))
    assert built.items == {"piqa": 3}


def test_offline_tasks_touch_no_network_and_no_cache(data, engine, monkeypatch):
    import datasets.config

    def refuse(*_):
        raise AssertionError("the network was used")

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    before = set(cache.rglob("*"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    built = tasks(list(OFFLINE), data, BYTES)
    built(engine)
    assert set(cache.rglob("*")) == before
    assert built.files.keys() == OFFLINE.keys()


@pytest.mark.parametrize(
    "name, message",
    [
        ("arc_challenge", r"task 'arc_challenge': --eval-data has files for arc_easy, .*, wikitext alone"),
        ("piqa", r"--eval-data .*: there is no piqa_valid.jsonl or piqa_valid.jsonl.gz in it"),
    ],
)
def test_what_eval_data_does_not_have_is_told(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        tasks([name], tmp_path, BYTES)


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch, data):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'piqa' needs lm-evaluation-harness: pip install 'megaresid\[eval\]'"):
        tasks(["piqa"], data, BYTES)


@pytest.fixture
def its_own(tmp_path, data, monkeypatch) -> Path:
    """lm-evaluation-harness with tasks of the test's own instead of the thousands that it comes with."""
    import lm_eval.tasks

    folder = tmp_path / "tasks"
    folder.mkdir()
    piqa = (
        "task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {file}}}}}\n"
        "validation_split: validation\noutput_type: {output}\ndoc_to_text: '{{{{goal}}}}'\ndoc_to_target: label\n"
        "doc_to_choice: '{{{{[sol1, sol2]}}}}'\n"
        "metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]\n"
    )
    here, output = data / "piqa_valid.jsonl", "multiple_choice"
    texts = {
        "solutions": piqa.format(name="solutions", file=here, output=output) + "num_fewshot: 2\ntag: both\n",
        "plain": piqa.format(name="plain", file=here, output=output) + "tag: both\n",
        "gone": piqa.format(name="gone", file=tmp_path / "nowhere.jsonl", output=output),
        "writing": piqa.format(name="writing", file=here, output="generate_until"),
        "pair": "group: pair\ntask: [solutions, plain]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=folder)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


def test_any_task_of_lm_eval_by_name_group_or_tag(its_own, engine, capsys):
    alone = tasks(["solutions", "plain"], None, BYTES)(engine)
    assert "reading solutions, plain from the Hugging Face Hub, or from its cache" in capsys.readouterr().err
    assert tasks(["both"], None, BYTES)(engine) == alone
    grouped = tasks(["pair"], None, BYTES)(engine)
    mean = (alone["solutions/acc"] + alone["plain/acc"]) / 2
    assert grouped.pop("pair/acc") == pytest.approx(mean)
    assert grouped.pop("pair/acc_stderr") > 0
    assert grouped == alone


def test_examples_in_prompts_are_the_same_in_every_run(its_own, engine, monkeypatch):
    """And others for each document: they are drawn."""
    asked = []

    def score(engine, requests):
        asked.append([tuple(request.context) for request in requests])
        return original(engine, requests)

    original = harness_model.score
    monkeypatch.setattr(harness_model, "score", score)
    built = tasks(["solutions"], None, BYTES)
    assert built(engine) == built(engine)
    assert asked[0] == asked[1]
    text = bytes(asked[0][0]).decode()
    assert text.count("\n\n") == 2, "two examples before the question"
    assert len({bytes(ids).split(b"\n\n")[0] for ids in asked[0]}) > 1


@pytest.mark.parametrize(
    "names, message",
    [
        (["plane"], "unknown task 'plane': did you mean 'plain'"),
        (["zzzzzz"], "unknown task 'zzzzzz': it is none of the 6 of lm-evaluation-harness"),
        (["gone"], r"gone: cannot be loaded \(FileNotFoundError: .*; where the Hugging Face Hub cannot be reached"),
        (["writing"], "task 'writing' has the model generate text"),
        (["pair", "plain"], "cannot be loaded .*Duplicate task 'plain'"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused_when_they_are_built(its_own, names, message):
    with pytest.raises(UserError, match=message) as raised:
        tasks(names, None, BYTES)
    assert "\n" not in str(raised.value)


def test_a_model_that_is_asked_to_write_says_that_it_does_not(engine):
    with pytest.raises(NotImplementedError, match="generate text"):
        harness_model.HarnessModel(engine, BYTES).generate_until([])
