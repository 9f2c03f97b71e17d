"""What a check of an installation says: one line, and what would mend it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from megaresid.errors import UserError

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """A fault keeps runs from working, a warning may. ``mend`` is empty where nothing is to be done."""

    level: Level
    subject: str
    words: str
    mend: str = ""

    def line(self) -> str:
        return f"{self.level:8} {self.subject}: {self.words}{self.mend and f': {self.mend}'}"


Check = Callable[[], Iterable[Finding]]


def ok(subject: str, words: str) -> Finding:
    return Finding("ok", subject, words)


def warning(subject: str, words: str, mend: str) -> Finding:
    return Finding("warning", subject, words, mend)


def fault(subject: str, words: str, mend: str) -> Finding:
    return Finding("fault", subject, words, mend)


def found_by(subject: str, check: Check) -> list[Finding]:
    """The findings of a check. One that fails itself is a fault, so that the others are still made."""
    try:
        return list(check())
    except UserError as error:
        return [fault(subject, one_line(error), "")]
    except Exception as error:  # whatever is broken in an installation, the rest is to be looked at
        return [fault(subject, f"cannot be checked ({type(error).__name__}: {one_line(error)})", "mend that first")]


def one_line(text: object) -> str:
    return " ".join(str(text).split())
