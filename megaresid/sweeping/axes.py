"""What a sweep varies, as it is written on the command line; and what its runs are called."""

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from megaresid.errors import UserError

LONGEST = 60
"""Characters of a layer spec in the name of a run; of a longer one the name has a beginning and a hash."""

Unit = Literal["tokens", "flops", "seconds"]


class Budget(NamedTuple):
    """What each run may spend: tokens, FLOPs, or seconds of training (evaluation and saving do not count)."""

    unit: Unit
    amount: float

    def __str__(self) -> str:
        return f"{self.unit}={self.amount:g}"


def split_specs(text: str, option: str) -> list[str]:
    """The layer specs of a list, at commas outside parentheses. Raises UserError for an empty one and one that is given
    twice."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    parts = [part.strip() for part in parts]
    if "" in parts:
        raise UserError(f"{option} {text!r}: a layer spec of the list is empty: take the comma out")
    _check_distinct(parts, option)
    return parts


def parse_seeds(text: str) -> list[int]:
    """``3`` is the seeds 1, 2, 3; ``7,9`` are these two, and ``7,`` is 7 alone. Raises UserError."""
    mend = "give how many, or the seeds themselves with commas (one seed: 7,)"
    words = [word.strip() for word in text.split(",")]
    listed = len(words) > 1
    if listed and not words[-1]:
        words.pop()
    if not all(re.fullmatch("[0-9]{1,12}", word) for word in words):
        raise UserError(f"--seeds {text}: {mend}")
    numbers = [int(word) for word in words]
    if listed:
        _check_distinct(numbers, "--seeds")
        return numbers
    if not 1 <= numbers[0] <= 10_000:
        raise UserError(f"--seeds {text}: from 1 to 10,000 of them: {mend}")
    return list(range(1, numbers[0] + 1))


def parse_rates(text: str) -> list[float]:
    """Learning rates with commas. Raises UserError."""
    rates = []
    for word in text.split(","):
        try:
            rate = float(word)
        except ValueError:
            rate = math.nan
        if not (rate > 0 and math.isfinite(rate)):
            raise UserError(f"--learning-rates {text}: {word.strip()!r} is no learning rate: give numbers above 0")
        rates.append(rate)
    _check_distinct([f"{rate:g}" for rate in rates], "--learning-rates")
    return rates


def parse_budget(text: str) -> Budget:
    unit, equals, number = text.partition("=")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if unit not in Unit.__args__ or not (amount > 0 and math.isfinite(amount)):
        raise UserError(f"--budget {text}: give tokens=NUMBER, flops=NUMBER or seconds=NUMBER, above 0")
    return Budget(unit, amount)


def _check_distinct(values: Sequence, option: str) -> None:
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{option}: {value} is given twice: give it once")


def variant_name(residual: str, attention: str) -> str:
    """Of the runs of one model, as a file is called: ``hyper_connections-streams=4-softmax``."""
    return f"{_plain(residual)}-{_plain(attention)}"


def run_name(variant: str, rate: float, seed: int) -> str:
    return f"{variant}-lr{rate:g}-seed{seed}"


def _plain(spec: str) -> str:
    plain = re.sub(r"[^\w.=]+", "-", spec).strip("-")
    if len(plain) <= LONGEST:
        return plain
    return f"{plain[: LONGEST - 9]}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"
