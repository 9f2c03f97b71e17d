"""Each perplexity is the plain sum over its definition, one window at a time, however the requests are run."""

import math
from pathlib import Path

import eval_data
import numpy as np
import pytest
import torch
from eval_data import BYTES, needs_real_data, small_data, write_jsonl
from measurables import FullLogits, bytes_model

from megaresid.errors import UserError
from megaresid.evaluation import perplexity
from megaresid.evaluation.loaded import LoadedModel
from megaresid.evaluation.perplexity import lambada, wikitext2
from megaresid.evaluation.texts import lambada_passages, wikitext2_pages, wikitext2_rows

END = 256
LETTERS = np.random.default_rng(0).integers(ord("a"), ord("z"), 100).astype(np.uint8).tobytes().decode()


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def log_p_of_last(engine, inputs, count):
    """Log-probability tables [count, vocabulary] after each of the last ``count`` inputs."""
    return engine.logits(torch.tensor([inputs]))[0].double().log_softmax(-1)[-count:].numpy()


def nats_in_windows(engine, tokens, uncounted=None):
    """Nats of every token but the first; one window after another, each beginning at the last one's last target."""
    total = 0.0
    while len(tokens) > 1:
        inputs, targets = tokens[: engine.context], tokens[1 : engine.context + 1]
        inputs = inputs[: len(targets)]
        table = log_p_of_last(engine, inputs, len(inputs))
        total -= sum(table[i][target] for i, target in enumerate(targets) if target != uncounted)
        tokens = tokens[len(targets) :]
    return total


def nats_of_page(engine, tokens):
    """lm-evaluation-harness's rolling windows: disjoint pieces of ``context`` targets, each read after all that the
    model can hold of what comes before; <|endoftext|> comes before the first token."""
    total = 0.0
    for start in range(0, len(tokens), engine.context):
        piece = tokens[start : start + engine.context]
        before = [END, *tokens[: start + len(piece) - 1]]
        table = log_p_of_last(engine, before[-engine.context :], len(piece))
        total -= sum(table[i][target] for i, target in enumerate(piece))
    return total


def of_pair(engine, context, continuation):
    """(log-probability, whether all are first choices) of a continuation, token by token; of both together the last
    ``context + 1`` tokens count, and the first of those is not predicted."""
    kept = [*context, *continuation][-(engine.context + 1) :]
    predicted = min(len(continuation), engine.context)
    total, greedy = 0.0, True
    for place in range(len(kept) - predicted, len(kept)):
        table = log_p_of_last(engine, kept[:place], 1)[0]
        total += table[kept[place]]
        greedy = greedy and table.argmax() == kept[place]
    return total, greedy


def engine_of(context, positions=1 << 20):
    return FullLogits(bytes_model(context), positions)


def wikitext_by_definition(engine, rows, detokenized_pages, pages):
    words = sum(len(page.split()) + page[:1].isspace() + page[-1:].isspace() for page in pages)
    size = sum(len(page.encode()) for page in pages)
    stream = bytes_of("\n\n".join(rows))
    nats = sum(nats_of_page(engine, bytes_of(page)) for page in detokenized_pages)
    return {
        "wikitext2/token_ppl": math.exp(nats_in_windows(engine, stream) / (len(stream) - 1)),
        "wikitext2/word_ppl": math.exp(nats / words),
        "wikitext2/byte_ppl": math.exp(nats / size),
        "wikitext2/bits_per_byte": nats / size / math.log(2),
    }


def test_wikitext_is_the_sum_over_its_windows(tmp_path):
    rows, pages = wikitext2_rows(small_data(tmp_path)), wikitext2_pages(wikitext2_rows(tmp_path))
    for context in (7, 16, 64):
        engine = engine_of(context)
        expected = wikitext_by_definition(engine, rows, [perplexity.detokenized(page) for page in pages], pages)
        assert wikitext2(tmp_path, BYTES)(engine) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("context", [1, 8])
def test_wikitext_at_the_edges_of_windows(tmp_path, context):
    """Streams and pages of every length up to three windows and two: shorter than one, whole ones, one or two over."""
    engine = engine_of(context)
    for length in range(1, 3 * context + 3):
        line = LETTERS[:length]
        (tmp_path / "wikitext2_raw_test.txt").write_text(f"{line}\n")
        expected = wikitext_by_definition(engine, [f"{line}\n"], [f"{line}\n"], [f"{line}\n"])
        assert wikitext2(tmp_path, BYTES)(engine) == pytest.approx(expected, rel=1e-9), length


def lambada_by_definition(engine, passages):
    stream = [token for passage in passages for token in (END, *bytes_of(passage))]
    nats = nats_in_windows(engine, stream, uncounted=END)
    found = []
    for passage in passages:
        context, last = passage[: passage.rindex(" ")], passage[passage.rindex(" ") :]
        blanks = len(context) - len(context.rstrip())
        cut = len(context) - blanks
        found.append(of_pair(engine, bytes_of(passage[:cut]), bytes_of(passage[cut : cut + blanks] + last)))
    return {
        "lambada/token_ppl": math.exp(nats / sum(len(passage.encode()) for passage in passages)),
        "lambada/lastword_ppl": math.exp(-sum(log_p for log_p, _ in found) / len(passages)),
        "lambada/lastword_acc": sum(greedy for _, greedy in found) / len(passages),
    }


@pytest.mark.parametrize("context", [1, 2, 5, 6, 16, 64])
def test_lambada_is_the_sum_over_its_passages(tmp_path, context):
    """Contexts shorter than a last word, those at whose edges documents begin, and those longer than the passages."""
    engine = engine_of(context)
    expected = lambada_by_definition(engine, lambada_passages(small_data(tmp_path)))
    assert lambada(tmp_path, BYTES)(engine) == pytest.approx(expected, rel=1e-9)


class Follows(FullLogits):
    """Expects " " after "c", "d" after " " and "e" after "d", and nothing else in particular."""

    def logits(self, idx):
        logits = torch.zeros(*idx.shape, 257, dtype=torch.float64)
        for token, expected in zip(b"c d", b" de"):
            logits[..., expected] = torch.where(idx == token, 9.0, logits[..., expected])
        return logits


def test_a_last_word_is_right_when_each_of_its_tokens_is_the_first_choice(tmp_path):
    """One is right, one is wrong in its last token, and one in its space."""
    write_jsonl(tmp_path / "lambada_test.jsonl", [{"text": text} for text in ("abc de", "abc dd", "abd de")])
    found = lambada(tmp_path, BYTES)(Follows(bytes_model(16), 64))
    right, wrong = 9 - math.log(256 + math.exp(9)), -math.log(256 + math.exp(9))
    assert found["lambada/lastword_acc"] == pytest.approx(1 / 3)
    assert found["lambada/lastword_ppl"] == pytest.approx(math.exp(-(7 * right + 2 * wrong) / 3))


@pytest.mark.parametrize("make", [wikitext2, lambada])
def test_nothing_depends_on_the_batch_size(tmp_path, make):
    measure = make(small_data(tmp_path), BYTES)
    expected = measure(engine_of(16))
    for windows in (1, 2, 5):
        engine = engine_of(16, windows * 16)
        assert measure(engine) == pytest.approx(expected, rel=1e-12)
        assert max(m * t for m, t in engine.shapes) <= windows * 16


def test_documents_of_one_window_share_its_run(tmp_path):
    """The model runs once for a window of the stream, though many passages end in it, and once for a last word."""
    engine = engine_of(64)
    lambada(small_data(tmp_path), BYTES)(engine)
    stream = sum(len(passage.encode()) + 1 for passage in eval_data.PASSAGES)
    windows, last_words = math.ceil((stream - 1) / 64), len(eval_data.PASSAGES)
    assert sum(m for m, _ in engine.shapes) <= windows + last_words


def measure_on_rank(folder, positions):
    """Runs on every rank."""
    engine = LoadedModel(bytes_model(16), torch.device("cpu"), None, positions)
    return wikitext2(Path(folder), BYTES)(engine) | lambada(Path(folder), BYTES)(engine)


def test_two_ranks_measure_what_one_does(ranks2, tmp_path):
    small_data(tmp_path)
    one = engine_of(16)
    expected = wikitext2(tmp_path, BYTES)(one) | lambada(tmp_path, BYTES)(one)
    for positions in (16, 200):
        first, second = ranks2.run(measure_on_rank, str(tmp_path), positions)
        assert first == second
        assert first == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("make", [wikitext2, lambada])
def test_a_model_of_another_vocabulary_is_refused(tmp_path, make):
    engine = engine_of(16)
    engine.vocab_size = 40
    with pytest.raises(UserError, match="the model predicts 40 tokens and the tokenizer bytes has 257: .*leave them"):
        make(small_data(tmp_path), BYTES)(engine)


def test_a_diverged_model_is_infinitely_perplexed(tmp_path):
    """A word of a thousand nats is more than a float's exponent can hold; one that is not a number stays so."""
    engine = engine_of(16)
    true_score = engine.score
    for nats, expected in ((1000.0, math.inf), (math.nan, math.nan)):
        engine.score = lambda idx, targets: (true_score(idx, targets)[0] * 0 - nats, true_score(idx, targets)[1])
        found = wikitext2(small_data(tmp_path), BYTES)(engine)
        assert found["wikitext2/word_ppl"] == pytest.approx(expected, nan_ok=True)


@needs_real_data
def test_the_published_texts_have_as_many_tokens_as_is_said():
    """What the docstrings state, and what others count."""
    from data_prep.tokenizer import gpt2_encoding

    class Counting:
        """Ends a measure where the model would begin."""

        context, vocab_size = 1024, 50_257

    encoding = gpt2_encoding()
    asked = []

    def scored(engine, requests):
        asked.append(requests)
        return [perplexity.Score(-1.0, True)] * len(requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "score", scored)
        wiki = wikitext2(eval_data.REAL, encoding)(Counting())
        words = lambada(eval_data.REAL, encoding)(Counting())
    stream, pages = asked[0][: math.ceil(287_643 / 1024)], asked[0][math.ceil(287_643 / 1024) :]
    assert sum(len(request.continuation) for request in stream) == 287_643
    assert sum(len(request.continuation) for request in pages) == 272_031
    assert wiki["wikitext2/word_ppl"] == pytest.approx(math.exp(len(pages) / 241_335))
    assert wiki["wikitext2/byte_ppl"] == pytest.approx(math.exp(len(pages) / 1_290_527))
    last_words, passages = asked[1][:5153], asked[1][5153:]
    assert sum(len(request.continuation) for request in last_words) == 6573
    assert sum(len(request.continuation) for request in passages) == 430_230
    assert words["lambada/lastword_acc"] == 1
