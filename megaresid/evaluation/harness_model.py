"""A model of ours as lm-evaluation-harness sees one. Imports lm_eval: import it only where a task is to be run."""

import functools
from collections.abc import Sequence

import tiktoken
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megaresid.evaluation.hook import Measurable
from megaresid.evaluation.scoring import Request, score

RECENT_TEXTS = 1024


class HarnessModel(TemplateLM):
    """Scores texts by a live engine or a loaded model.

    To lm-evaluation-harness every rank is the only one: each makes the same requests and gets the same scores, and
    ``score`` shares the work among them. Text is encoded as ordinary text: a literal <|endoftext|> is no special token.
    """

    def __init__(self, engine: Measurable, encoding: tiktoken.Encoding):
        super().__init__()
        self.engine, self.encoding = engine, encoding
        # The choices of a question come one after another, and each is encoded with the question and without.
        self._encode = functools.lru_cache(RECENT_TEXTS)(encoding.encode_ordinary)

    @property
    def eot_token_id(self) -> int:
        return self.encoding.eot_token

    @property
    def max_length(self) -> int:
        """The most tokens of one input."""
        return self.engine.context

    @property
    def tokenizer_name(self) -> str:
        return self.encoding.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self._encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether it is the greedy choice) of each request's (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability in nats of each request's text: its first token follows <|endoftext|>, and each is
        predicted once, in windows of ``max_length`` of which the last alone may see tokens that an earlier one has
        predicted."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            found = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += found
            owners += [owner] * len(found)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_probability
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        raise NotImplementedError("tasks that generate text are not supported: only those that score given text")

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **_
    ) -> list[tuple[float, bool]]:
        scores = score(self.engine, [Request(context, continuation) for _, context, continuation in requests])
        return [(found.log_probability, found.greedy) for found in scores]
