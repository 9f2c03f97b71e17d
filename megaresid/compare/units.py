"""Numbers as people read them: units by size, digits by kind, a true minus sign."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"
UNKNOWN = "n/a"
LOSS_PLACES = 4
LARGE = 1e9


@dataclass(frozen=True)
class Unit:
    """``value / factor`` is the number to show, and ``name`` what stands beside it."""

    factor: float
    name: str


TOKENS = (Unit(1, "tokens"), Unit(1e3, "tokens (10³)"), Unit(1e6, "tokens (10⁶)"), Unit(1e9, "tokens (10⁹)"))
FLOPS = tuple(Unit(10.0 ** (3 * power), f"{prefix}FLOPs") for power, prefix in enumerate(("", "k", *"MGTPEZY")))
TIME = (Unit(1e-3, "ms"), Unit(1, "s"), Unit(60, "minutes"), Unit(3600, "hours"))
BYTES = (Unit(2**20, "MiB"), Unit(2**30, "GiB"))


def unit_for(values: Iterable[float], units: tuple[Unit, ...]) -> Unit:
    """The largest unit in which the largest of the values is 1 at least; the smallest where none is so large."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return next((unit for unit in reversed(units) if largest >= unit.factor), units[0])


def fixed(value: float | None, places: int = LOSS_PLACES, signed: bool = False) -> str:
    """``value`` with so many places after the point, and groups of three digits before it; an exponent from 10⁹ on,
    as the perplexity of a spoilt model can have."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= LARGE:
        return f"{value:{'+' if signed else ''}.4g}".replace("-", MINUS)
    text = f"{value:{'+' if signed else ''},.{places}f}"
    return text.replace("-", MINUS)


def places_for(value: float) -> int:
    """How many places show five digits of a number, at most four of them: a loss, a perplexity, a share."""
    if not math.isfinite(value) or value == 0:
        return LOSS_PLACES
    return min(LOSS_PLACES, max(0, LOSS_PLACES - math.floor(math.log10(abs(value)))))


def significant(value: float | None, digits: int = 4) -> str:
    """``value`` with so many digits, without an exponent between 10⁻⁵ and 10¹⁵."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if not -5 <= power < 15:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    text = f"{value:,.{max(0, digits - 1 - power)}f}"
    return text.replace("-", MINUS)


def rate(value: float) -> str:
    """A learning rate, as it is written on a command line."""
    return f"{value:.6g}"


def probability(value: float | None) -> str:
    """A p-value, which below 0.0001 is only bounded."""
    if value is None:
        return UNKNOWN
    return "< 0.0001" if value < 1e-4 else f"{value:.3g}"


def counted(number: int, noun: str) -> str:
    """``3 seeds``, ``1 seed``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
