"""Perplexity on WikiText-2 and LAMBADA, by each of the definitions in use, under names that keep them apart.

Per token of a stream, as nanoGPT-style scripts have it, and as lm-evaluation-harness has it: per word and byte of a
page, or of a last word. Papers rarely say which is theirs, and they differ widely: 1.127 tokens make a word of
WikiText-2's pages, so 35 per token is 55 per word. All are sums of log-probabilities in nats over requests
(``megaresid.evaluation.scoring``), which the ranks share, and with GPT-2's tokens each is fixed by text and context.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken

from megaresid.errors import UserError
from megaresid.evaluation.hook import Measurable, Measure
from megaresid.evaluation.scoring import Request, Score, score
from megaresid.evaluation.texts import (
    count_words,
    detokenized,
    lambada_passages,
    split_last_word,
    wikitext2_pages,
    wikitext2_rows,
    wikitext2_stream,
)


def wikitext2(data: Path | None, encoding: tiktoken.Encoding) -> Measure:
    """WikiText-2's raw test split, from ``data`` or the Hub (None).

    ``wikitext2/token_ppl``: exp of the mean nats of the 287,643 tokens after the first of one stream of 287,644 (the
    Hub's rows joined by two line ends), read in windows of ``context`` that follow one another (``windows``).

    ``wikitext2/word_ppl``, ``byte_ppl`` and ``bits_per_byte``: lm-evaluation-harness's task ``wikitext``. The nats of
    272,031 tokens of the 62 detokenized pages, in its rolling windows (``rolling_windows``), divided by the 241,335
    words or 1,290,527 bytes of the pages before that.

    Raises UserError for bad data; the measure does so for a model of another vocabulary.
    """
    rows = wikitext2_rows(data)
    pages = wikitext2_pages(rows)
    stream = encoded(encoding, wikitext2_stream(rows))
    documents = [after_end_of_text(encoding, detokenized(page)) for page in pages]
    words, size = sum(map(count_words, pages)), sum(len(page.encode()) for page in pages)

    def measure(engine: Measurable) -> dict[str, float]:
        require_vocabulary(engine, encoding)
        of_stream = list(windows(stream, engine.context))
        of_pages = [window for document in documents for window in rolling_windows(document, engine.context)]
        scores = score(engine, of_stream + of_pages)
        stream_nats, pages_nats = nats(scores[: len(of_stream)]), nats(scores[len(of_stream) :])
        return {
            "wikitext2/token_ppl": exp(stream_nats / (len(stream) - 1)),
            "wikitext2/word_ppl": exp(pages_nats / words),
            "wikitext2/byte_ppl": exp(pages_nats / size),
            "wikitext2/bits_per_byte": pages_nats / size / math.log(2),
        }

    return measure


def lambada(data: Path | None, encoding: tiktoken.Encoding) -> Measure:
    """LAMBADA's test passages in OpenAI's version, from ``data`` or the Hub (None).

    ``lambada/token_ppl``: exp of the mean nats of all 430,230 tokens of the 5,153 passages, in one stream with
    <|endoftext|> before each, as this project's shards have documents. Its windows are as those of WikiText-2's stream,
    but <|endoftext|> is only read: as a target it counts nothing (``document_windows``).

    ``lambada/lastword_ppl`` and ``lambada/lastword_acc``: lm-evaluation-harness's task ``lambada_openai``. Of the last
    word of each passage, given all before it, exp(-mean over passages of the log-probability of its 6,573 tokens), and
    the share of passages in which each of them is the model's first choice.

    Raises UserError for bad data; the measure does so for a model of another vocabulary.
    """
    passages = lambada_passages(data)
    stream = np.concatenate([after_end_of_text(encoding, passage) for passage in passages])
    counted = np.count_nonzero(stream != encoding.eot_token)
    last_words = [Request(*encoded_pair(encoding, *split_last_word(passage))) for passage in passages]

    def measure(engine: Measurable) -> dict[str, float]:
        require_vocabulary(engine, encoding)
        of_stream = document_windows(stream, engine.context, encoding.eot_token)
        scores = score(engine, [*last_words, *of_stream])
        of_last_words = scores[: len(last_words)]
        return {
            "lambada/token_ppl": exp(nats(scores[len(last_words) :]) / counted),
            "lambada/lastword_ppl": exp(nats(of_last_words) / len(last_words)),
            "lambada/lastword_acc": sum(found.greedy for found in of_last_words) / len(last_words),
        }

    return measure


def windows(tokens: np.ndarray, context: int) -> Iterator[Request]:
    """Windows of ``context`` inputs that follow one another: each token [N] but the first is predicted once, a window's
    first target from the one token before it, its others from the window. The last window may be shorter."""
    for start in range(0, len(tokens) - 1, context):
        yield Request(tokens[start : start + 1], tokens[start + 1 : start + context + 1])


def document_windows(tokens: np.ndarray, context: int, end_of_text: int) -> Iterator[Request]:
    """The same windows without ``end_of_text`` as a target: one request for what lies between two of them. Those of a
    window begin alike, so the model runs once for all."""
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1]
        bounds = [0, *(np.flatnonzero(window[1:] == end_of_text) + 1), len(window)]
        for before, end in zip(bounds, bounds[1:]):
            if end > before + 1:
                yield Request(window[: before + 1], window[before + 1 : end])


def rolling_windows(tokens: np.ndarray, context: int) -> Iterator[Request]:
    """lm-evaluation-harness's windows with a context of one: as ``windows``, but a last window that is shorter reads
    as many tokens before its first target as ``context`` allows. ``tokens`` [N] begin with its prefix, <|endoftext|>,
    which only the first window reads."""
    for start in range(0, len(tokens) - 1, context):
        targets = tokens[start + 1 : start + context + 1]
        first = start - (context - len(targets)) if start else 0
        yield Request(tokens[first : start + 1], targets)


def encoded(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """The tokens of a text, uint32 [N]; <|endoftext|> in it is ordinary text."""
    return encoding.encode_to_numpy(text, disallowed_special=())


def after_end_of_text(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """<|endoftext|>, then the tokens of a text: uint32 [1 + N]."""
    return np.concatenate([np.array([encoding.eot_token], np.uint32), encoded(encoding, text)])


def encoded_pair(encoding: tiktoken.Encoding, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of both, cut apart as lm-evaluation-harness does: white space that ends the context goes to the
    continuation, and the continuation's tokens are those of the whole after as many as the context alone has."""
    kept = context.rstrip()
    length = len(encoded(encoding, kept))
    whole = encoded(encoding, context + continuation)
    return encoded(encoding, kept), whole[length:]


def require_vocabulary(engine: Measurable, encoding: tiktoken.Encoding) -> None:
    """Raises UserError for a model that predicts other tokens than the encoding's."""
    if engine.vocab_size != encoding.n_vocab:
        raise UserError(
            f"the model predicts {engine.vocab_size} tokens and the tokenizer {encoding.name} has {encoding.n_vocab}: "
            "WikiText-2 and LAMBADA need a model that was trained with it; leave them out of the evaluation"
        )


def nats(scores: Iterable[Score]) -> float:
    return -math.fsum(found.log_probability for found in scores)


def exp(nats_each: float) -> float:
    """A model that has diverged may be worse than a float can say."""
    try:
        return math.exp(nats_each)
    except OverflowError:
        return math.inf
