"""Which numbers of an evaluation are compared, and whether lower or higher is better."""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

LOWER = ("token_ppl", "word_ppl", "byte_ppl", "lastword_ppl", "ppl", "perplexity", "word_perplexity", "byte_perplexity")
LOWER += ("bits_per_byte", "val_bits_per_byte", "loss", "nll", "brier_score")
HIGHER = ("acc", "acc_norm", "acc_bytes", "lastword_acc", "accuracy", "exact_match", "em", "f1", "mcc")
OURS = frozenset(
    "schema step tokens train_loss val_loss learning_rate gradient_norm tokens_per_second mfu memory_bytes "
    "skipped_steps skipped_batches training_seconds failed failed_saves".split()
)
"""Numbers of a training's own."""
NO_RESULT = re.compile(r"seconds/.*|diagnostics/.*|.*_stderr(\.[^/]*)?")
"""Costs, diagnostics and standard errors."""

Better = Literal["lower", "higher"]


def better(name: str) -> Better | None:
    """Of ``TASK/METRIC`` or ``TASK/METRIC.filter``; None where it is not known."""
    metric = name.rpartition("/")[2]
    for known in (metric, metric.partition(".")[0]):
        if known in LOWER:
            return "lower"
        if known in HIGHER:
            return "higher"
    return None


def metric_names(measured: Iterable[Mapping[str, float]]) -> list[tuple[str, Better]]:
    """All names that are compared, in their order, with what is better."""
    return [(name, better(name)) for name in _results(measured) if better(name)]


def left_out(measured: Iterable[Mapping[str, float]]) -> list[str]:
    """The names of results of which it is not known whether lower or higher is better."""
    return [name for name in _results(measured) if not better(name)]


def _results(measured: Iterable[Mapping[str, float]]) -> list[str]:
    names = {name for one in measured for name in one}
    return sorted(name for name in names if name not in OURS and not NO_RESULT.fullmatch(name))
