"""The summary against counts and numbers written out here."""

import json
import math
import shlex
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_prep.manifest import write_manifest
from data_prep.writer import ShardWriter
from megaresid import summary
from megaresid.data.manifest import Content, Manifest, Provenance, load_manifest
from megaresid.data.shards import TokenStream

VOCABULARY = 16
CONTEXT = 4
TRAINING = [0, 1, 1, 2, 3, 5, 8, 13, 5, 2, 7, 9] * 3
VALIDATION = [15, 1, 2, 1, 1, 0, 5, 9, 9, 4, 4, 4, 3, 14, 14, 14, 14, 14, 14, 14, 12, 12, 12]


def write_data(folder: Path, training: list[int], validation: list[int], shard_tokens: int) -> Path:
    folder.mkdir()
    shards = []
    for split, ids in (("train", training), ("val", validation)):
        writer = ShardWriter(folder, split, shard_tokens)
        writer.append(np.array(ids, dtype=np.uint16))
        shards += writer.finish()
    content = Content(
        source={"kind": "text", "revision": "1"},
        options={"shard_tokens": shard_tokens, "validation_fraction": 0.5},
        tokenizer={"name": "gpt2", "sha256": "0" * 64, "vocab_size": 50257, "end_of_text": 50256},
        split_rule="by hand",
        splits={
            "train": {"documents": 1, "tokens": len(training)},
            "val": {"documents": 1, "tokens": len(validation)},
        },
        dropped={"empty": 0},
        runs_cut=0,
        shards=tuple(shards),
    )
    made = Provenance(created="2026-01-01T00:00:00+00:00", inputs=(), text_column="text", workers=1, versions={})
    write_manifest(folder, Manifest(schema=1, content=content, provenance=made))
    return folder


def streams(folder: Path) -> tuple[TokenStream, TokenStream]:
    manifest = load_manifest(folder)
    return TokenStream.open(folder, manifest, "train"), TokenStream.open(folder, manifest, "val")


def by_hand(training: list[int], validation: list[int], tokens: int, vocabulary: int) -> float:
    """Mean of -log((count + 1) / (tokens + vocabulary)) over the targets, validation tokens 1 to ``tokens``."""
    counts = Counter(training)
    cost = {token: -math.log((counts[token] + 1) / (len(training) + vocabulary)) for token in range(vocabulary)}
    return math.fsum(cost[token] for token in validation[1 : tokens + 1]) / tokens


def of_one_folder(training: TokenStream, validation: TokenStream, tokens: int) -> float:
    return summary.unigram_loss([training], [validation], [tokens], [Fraction(1)], VOCABULARY)


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run directory and its data, both in folders with a space in their names."""
    data = write_data(tmp_path / "my data", TRAINING, VALIDATION, shard_tokens=10)
    run = tmp_path / "first run"
    run.mkdir()
    identity = load_manifest(data).identity
    (run / "config.json").write_text(json.dumps({"schema": 1, "validation_tokens": 14}))
    (run / "spec.json").write_text(json.dumps({"schema": 1, "shape": {"context": CONTEXT, "vocab_size": VOCABULARY}}))
    (run / "data.json").write_text(json.dumps({"schema": 1, "folder": str(data), "identity": identity}))
    write_metrics(
        run,
        {"step": 0, "tokens": 0, "val_loss": 2.7725},
        {"step": 10, "train_loss": 2.5, "tokens_per_second": 1000.0},
        {"step": 20, "train_loss": 2.4, "tokens_per_second": 9000.0},
        {"step": 30, "train_loss": 2.3, "tokens_per_second": 2000.4},
        {"step": 30, "tokens": 12345, "val_loss": 2.25},
    )
    return run


def write_metrics(run: Path, *rows: dict) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def fails_with(capsys, monkeypatch, run: Path) -> str:
    """Run the command; check that it exits with 2 and says one line. The line."""
    monkeypatch.setattr("sys.argv", ["summary", "--run", str(run)])
    with pytest.raises(SystemExit) as caught:
        summary.main()
    assert caught.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    return said


def test_the_unigram_loss_is_that_of_add_one_counts(tmp_path):
    training, validation = streams(write_data(tmp_path / "data", TRAINING, VALIDATION, shard_tokens=10))
    for tokens in (1, 12, len(VALIDATION) - 1):
        wanted = by_hand(TRAINING, VALIDATION, tokens, VOCABULARY)
        assert of_one_folder(training, validation, tokens) == pytest.approx(wanted, rel=1e-12)


def test_the_unigram_loss_of_a_stream_of_several_pieces(tmp_path):
    """Both splits end within a piece, and a shard ends within another."""
    generator = np.random.default_rng(0)
    sizes = 2 * summary.PIECE + 12345, summary.PIECE + 678
    # The frequencies change along the stream, so that a piece left out or counted twice shows.
    ids = [(generator.random(n) * np.linspace(3, VOCABULARY, n)).astype(int).tolist() for n in sizes]
    training, validation = streams(write_data(tmp_path / "data", *ids, shard_tokens=700_000))
    tokens = len(ids[1]) - 1
    wanted = by_hand(*ids, tokens, VOCABULARY)
    assert of_one_folder(training, validation, tokens) == pytest.approx(wanted, rel=1e-12)


def test_only_the_first_training_tokens_are_counted(tmp_path, monkeypatch):
    training, validation = streams(write_data(tmp_path / "data", TRAINING, VALIDATION, shard_tokens=10))
    monkeypatch.setattr(summary, "COUNTED_TOKENS", 7)
    wanted = by_hand(TRAINING[:7], VALIDATION, 12, VOCABULARY)
    assert of_one_folder(training, validation, 12) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("validation_tokens", "targets"), [(14, 12), (1000, 20)])
def test_the_summary_says_what_the_run_came_to(run, validation_tokens, targets):
    """Validation is cut to whole windows of 4: 12 of 14 tokens; 20 of the 22 that have a target, if all are wanted."""
    (run / "config.json").write_text(json.dumps({"schema": 1, "validation_tokens": validation_tokens}))
    unigram = by_hand(TRAINING, VALIDATION, targets, VOCABULARY)
    *lines, tensorboard = summary.summarise(run).splitlines()
    assert lines == [
        "validation loss   2.772 at step 0, 2.250 at step 30 after 12,345 tokens",
        f"unigram loss      {unigram:.3f} on the same tokens: the run ends {unigram - 2.25:.3f} below it",
        "speed             2,000 tokens per second (median, training alone)",
        f"run directory     {run}",
    ]
    name, program, *arguments = shlex.split(tensorboard)
    assert name == "TensorBoard" and Path(program).name == "tensorboard"
    assert arguments == ["--logdir", str(run / "tensorboard")]


def test_the_unigram_loss_of_two_folders(run):
    """Shares of 1/4 and 3/4 of 36 and 20 counted tokens: the frequencies are those of (36 + 3 * 20) / 4 = 24 tokens, of
    which 6 are spread as the first folder's are. Validation is 1 and 3 windows of 4."""
    other_training, other_validation = [3, 3, 4, 12] * 5, [7, 3, 3, 12, 4] * 4
    other = write_data(run.parent / "other data", other_training, other_validation, shard_tokens=7)
    folders = [
        {"folder": str(folder), "identity": load_manifest(folder).identity, "share": share}
        for folder, share in ((run.parent / "my data", "1/4"), (other, "3/4"))
    ]
    (run / "data.json").write_text(json.dumps({"schema": 1, "identity": "0", "folders": folders}))
    (run / "config.json").write_text(json.dumps({"schema": 1, "validation_tokens": 4 * CONTEXT}))
    first, second = Counter(TRAINING), Counter(other_training)
    cost = {
        token: -math.log((6 * first[token] / 36 + 18 * second[token] / 20 + 1) / (24 + VOCABULARY))
        for token in range(VOCABULARY)
    }
    targets = VALIDATION[1 : 1 * CONTEXT + 1] + other_validation[1 : 3 * CONTEXT + 1]
    wanted = math.fsum(cost[token] for token in targets) / len(targets)
    assert f"unigram loss      {wanted:.3f} on the same tokens" in summary.summarise(run)


def test_a_loss_above_the_unigram_loss_and_one_that_is_not_finite(run):
    unigram = by_hand(TRAINING, VALIDATION, 12, VOCABULARY)
    write_metrics(run, {"step": 30, "tokens": 12345, "val_loss": 9.0})
    assert f"the run ends {9 - unigram:.3f} above it" in summary.summarise(run)
    write_metrics(run, {"step": 0, "tokens": 0, "val_loss": 2.5}, {"step": 30, "tokens": 12345, "val_loss": None})
    losses, unigram_line, *_ = summary.summarise(run).splitlines()
    assert losses == "validation loss   2.500 at step 0, not finite at step 30 after 12,345 tokens"
    assert unigram_line == f"unigram loss      {unigram:.3f} on the same tokens"


def test_what_is_no_run(tmp_path, capsys, monkeypatch):
    said = fails_with(capsys, monkeypatch, tmp_path / "mistyped")
    assert "mistyped" in said and "not a run directory" in said


def test_a_run_without_an_evaluation(run, capsys, monkeypatch):
    write_metrics(run, {"step": 10, "train_loss": 2.5, "tokens_per_second": 1000.0})
    assert "no evaluation has been recorded" in fails_with(capsys, monkeypatch, run)
    (run / "metrics.jsonl").unlink()
    assert "no evaluation has been recorded" in fails_with(capsys, monkeypatch, run)


def test_the_last_number_of_each_evaluation_its_failures_and_its_cost(run):
    """Without a validation; a hook that failed and worked again has not failed, one that failed last has."""
    told = {"schema": 1, "tokens": 0}
    write_metrics(
        run,
        {"step": 0, **told, "wikitext2/token_ppl": 50000.0, "seconds/wikitext2": 3.25},
        {"step": 0, **told, "failed": {"mine:own": "evaluation mine:own failed at step 0: no luck"}},
        {"step": 10, **told, "mine": None, "seconds/mine:own": 0.5},
        {"step": 10, **told, "failed": {"lambada": "evaluation lambada failed at step 10: no file"}},
        {"step": 20, **told, "wikitext2/token_ppl": 54.114, "seconds/wikitext2": 3.5},
        {"step": 20, **told, "a/acc": 0.54, "a/acc_stderr": 0.0123, "b/acc": 0.25, "seconds/a,b": 1000.0},
    )
    assert summary.summarise(run).splitlines()[:-2] == [
        "wikitext2/token_ppl 54.11 at step 20",
        "mine              not finite at step 10",
        "a/acc             0.54 +- 0.012 at step 20",
        "b/acc             0.25 at step 20",
        "failed            evaluation lambada failed at step 10: no file",
        "evaluation took   wikitext2 6.8 s, mine:own 0.5 s, a,b 1,000.0 s",
    ]


def test_a_data_folder_that_is_gone_or_holds_other_data(run, capsys, monkeypatch):
    data = run.parent / "my data"
    data.rename(run.parent / "elsewhere")
    said = fails_with(capsys, monkeypatch, run)
    assert f"data folder {data} is gone" in said and "data.json" in said
    write_data(data, TRAINING, VALIDATION[::-1], shard_tokens=10)
    said = fails_with(capsys, monkeypatch, run)
    assert str(data) in said and "other data" in said
