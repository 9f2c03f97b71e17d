"""The steps for datatrove, run by its local executor, against the definition."""

import hashlib

import pyarrow
import pytest
from jobs import data_set, expected_shards, expected_tokens
from pyarrow import parquet

from data_prep import tokenizer
from megaresid.errors import UserError

pytest.importorskip("datatrove", reason="the extra [datatrove] is not installed")

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader

from data_prep import datatrove_step
from data_prep.datatrove_step import CutShards, Tokenize, utf8

TEXTS = {
    "a": [f"First {number} of many." for number in range(30)] + ["", "<|endoftext|> is text", " \n"],
    "b": [f"Second {number}, {'very ' * (number % 5)}long." for number in range(40)] + ["日本語", "First 3 of many."],
    "c": [f"Third {number}." for number in range(10)],
}


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, documents in TEXTS.items():
        ids = [f"{name}{number}" for number in range(len(documents))]
        parquet.write_table(pyarrow.table({"text": documents, "id": ids}), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def ranks():
    return tokenizer.gpt2_ranks(None)


@pytest.fixture(autouse=True)
def vocabulary(ranks, monkeypatch):
    """The vocabulary is loaded once for all tests."""
    monkeypatch.setattr("data_prep.worker.gpt2_ranks", lambda vocab_file: ranks)


def first_stage(texts, out, logs, tasks=2) -> LocalPipelineExecutor:
    reader = ParquetReader(str(texts), glob_pattern="*.parquet")
    return LocalPipelineExecutor([reader, Tokenize(out)], tasks=tasks, workers=1, logging_dir=str(logs))


def in_order(tasks: int) -> list[str]:
    """By definition: datatrove deals its sorted files out to tasks in turn; its readers leave out empty rows."""
    names = [name for task in range(tasks) for name in sorted(TEXTS)[task::tasks]]
    return [text for name in names for text in TEXTS[name] if text.strip()]


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_data_set_by_definition(texts, tmp_path, tasks):
    out = tmp_path / "out"
    first = first_stage(texts, out, tmp_path / "first", tasks)
    cut = [CutShards(out, tasks, shard_tokens=100, validation_fraction=0.2)]
    LocalPipelineExecutor(cut, tasks=1, workers=1, logging_dir=str(tmp_path / "second"), depends=first).run()
    shards, content = data_set(out)
    documents = in_order(tasks)
    assert shards == expected_shards(documents)
    for split, tokens in expected_tokens(documents, 0.2).items():
        assert content["splits"][split] == {"documents": tokens.count(50256), "tokens": len(tokens)}
    digests = b"".join(hashlib.sha256(text.encode()).digest() for text in documents)
    assert content["source"] == {"kind": "datatrove", "revision": f"sha256:{hashlib.sha256(digests).hexdigest()}"}


def run_tasks(out, *documents: list[str], tasks: int | None = None) -> None:
    for rank, texts in enumerate(documents):
        data = (Document(text=text, id=f"{rank}/{number}") for number, text in enumerate(texts))
        Tokenize(out).run(data, rank, tasks or len(documents))


def test_options_of_the_cut(tmp_path):
    documents = in_order(1)
    run_tasks(tmp_path / "out", TEXTS["a"], TEXTS["b"], TEXTS["c"])
    CutShards(tmp_path / "out", 3, shard_tokens=100, validation_fraction=0.2, deduplicate=True, limit_tokens=400).run()
    taken, total = [], 0
    for text in dict.fromkeys(documents):
        total += sum(map(len, expected_tokens([text], 0.2).values()))
        if total > 400:
            break
        taken.append(text)
    shards, content = data_set(tmp_path / "out")
    assert shards == expected_shards(taken)
    # The duplicate stands behind the limit: only the empty texts, all in the first part, are counted.
    assert len(taken) < len(documents) - 2 and content["limited"] and content["dropped"] == {"empty": 2}


def test_a_task_that_was_stopped_starts_over_and_one_that_is_done_does_not(tmp_path):
    def stopping():
        yield Document(text="one that came before the end", id="0")
        raise KeyboardInterrupt

    def never():
        raise AssertionError("the task is done")
        yield

    out = tmp_path / "out"
    run_tasks(out, TEXTS["a"], tasks=2)
    with pytest.raises(KeyboardInterrupt):
        Tokenize(out).run(stopping(), 1, 2)
    with pytest.raises(UserError, match="no part of task 1 of 2; run Tokenize with 2 tasks"):
        CutShards(out, 2).run()
    left = {path.name for path in (out / "parts").iterdir()}
    assert left == {"000000-000000.ids", "000000-000000.docs", "000000-000000.json"}
    step = Tokenize(out)
    step.run(never(), 0, 2)
    assert step.stats["documents"].total == 31
    run_tasks(out, never(), TEXTS["b"])
    CutShards(out, 2, shard_tokens=100, validation_fraction=0.2).run()
    assert data_set(out)[0] == expected_shards([text for name in "ab" for text in TEXTS[name] if text.strip()])


def test_parts_of_another_number_of_tasks_are_no_parts(tmp_path):
    run_tasks(tmp_path / "out", TEXTS["a"], TEXTS["b"], tasks=3)
    with pytest.raises(UserError, match="no part of task 0 of 2"):
        CutShards(tmp_path / "out", 2).run()


def test_remains_of_a_cut_that_was_killed(tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_tasks(out, TEXTS["a"])
    with monkeypatch.context() as patch:
        patch.setattr(datatrove_step, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            CutShards(out, 1, shard_tokens=10, validation_fraction=0.2).run()
    assert list(out.glob("*.bin")) and not (out / "manifest.json").exists()
    CutShards(out, 1, shard_tokens=100, validation_fraction=0.2).run()
    assert data_set(out)[0] == expected_shards([text for text in TEXTS["a"] if text.strip()])


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="--validation-fraction 1.5: must be between 0 and 1"):
        CutShards(tmp_path, 1, validation_fraction=1.5)
    with pytest.raises(UserError, match="its stage has 2 tasks; give that executor tasks=1"):
        CutShards(tmp_path, 2).run(rank=1, world_size=2)
    out = tmp_path / "out"
    run_tasks(out, TEXTS["b"])
    CutShards(out, 1, validation_fraction=0.2).run()
    before = data_set(out)
    for step in (Tokenize(out), CutShards(out, 1)):
        with pytest.raises(UserError, match="already holds a data set"):
            step.run(None)
    assert data_set(out) == before


def test_half_a_surrogate_pair():
    assert utf8("a\ud83dz") == "a\ufffdz".encode()
    assert utf8("\U0001f600") == b"\xf0\x9f\x98\x80"
