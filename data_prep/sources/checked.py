"""What becomes of a row: a document, or a count of what was left out and why.

The first of these that holds, in this order:

    bad_rows        a line that is no JSON object, a row without the field or with something else than text in it
    other_language  the column "language" is not --language (null is not)
    low_score       "language_score" is below --minimum-language-score, or "score" below --minimum-score (null is)
    too_long        the text, or the line of JSON that it is in, is longer than 128 MiB
    empty           the text is null, has no characters, or white space alone
    invalid_utf8    the text is not UTF-8; for JSON, where it comes before the filters, any part of the line

Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes U+FFFD. Blank lines of JSON are no rows. Of a line
of 8 MiB or more nothing but the fields that are wanted is parsed: what is wrong in the others does not show.

A file that cannot be read to its end is an error, or with --skip-unreadable counted as "unreadable" and left out whole
(of a file that is read in parts, the part): one that vanished, is cut short or damaged, has another size than when it
was listed, or a Parquet file with a page of more than 192 MiB.
What looks like a wrong option is always an error: a file without the text column or a filter's column (for JSON: in its
first row), and a unit of at least 10 bad rows (bad_rows and invalid_utf8) that are more than half of its rows.
"""

import codecs
from collections.abc import Collection
from dataclasses import dataclass

from data_prep.sources.source import MOST_BYTES, Tally, Unit
from megaresid.errors import UserError

# Fewer bad rows than this are never an error.
FEW_BAD_ROWS = 10
SLICE = 2**20


@dataclass(frozen=True)
class Filters:
    """Which rows are wanted, by FineWeb's own columns; None wants all."""

    language: str | None = None
    minimum_language_score: float | None = None
    minimum_score: float | None = None

    @property
    def options(self) -> dict[str, str]:
        """The option that needs it, by column."""
        wanted = {
            "language": ("--language", self.language),
            "language_score": ("--minimum-language-score", self.minimum_language_score),
            "score": ("--minimum-score", self.minimum_score),
        }
        return {column: option for column, (option, value) in wanted.items() if value is not None}

    @classmethod
    def of(cls, job) -> "Filters":
        """Those that a job (data_prep.job.Job) asks for."""
        return cls(job.language, job.minimum_language_score, job.minimum_score)

    def reason(self, row: dict) -> str | None:
        """Why the row is left out, None when it is wanted; a missing value is null."""
        if self.language is not None and row.get("language") != self.language:
            return "other_language"
        for column, minimum in (("language_score", self.minimum_language_score), ("score", self.minimum_score)):
            if minimum is not None:
                value = row.get(column)
                if not isinstance(value, int | float) or not value >= minimum:
                    return "low_score"
        return None


def refusal(text: bytes | bytearray, known_utf8: bool = False) -> str | None:
    """Why these bytes are no document, None when they are one; ``known_utf8`` where that need not be looked at."""
    if len(text) > MOST_BYTES:
        return "too_long"
    if not known_utf8 and not is_utf8(text):
        return "empty" if not text else "invalid_utf8"
    return "empty" if is_blank(text) else None


def is_utf8(text: bytes) -> bool:
    try:
        if len(text) <= SLICE:
            text.decode()
            return True
        # All at once, one character beyond U+FFFF would make four bytes of each.
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(text), SLICE):
            decoder.decode(text[start : start + SLICE])
        decoder.decode(b"", final=True)
        return True
    except UnicodeDecodeError:
        return False


def is_blank(text: bytes) -> bool:
    """Whether valid UTF-8 is white space alone, as str.isspace has it, or nothing."""
    if not text:
        return True
    if 0x20 < text[0] < 0x80:
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    starts = (0, *range(64, len(text), SLICE))
    for start, end in zip(starts, (*starts[1:], len(text)), strict=True):
        part = decoder.decode(text[start:end])
        if part and not part.isspace():
            return False
    return True


def check_bad_rows(unit: Unit, rows: int, tally: Tally) -> None:
    """Raise UserError where most rows of the unit are bad; ``tally`` counts what was left out of it."""
    bad = tally["bad_rows"] + tally["invalid_utf8"]
    if bad >= FEW_BAD_ROWS and 2 * bad > rows:
        first, *others = unit.segments
        name = f"{first.name} and the {len(others)} files after it" if others else first.name
        raise UserError(
            f"{name}: {bad:,} of {rows:,} rows are bad ({tally['bad_rows']:,} without text in the column, "
            f"{tally['invalid_utf8']:,} not UTF-8); check --source and --text-column, or mend the file"
        )


def check_columns(name: str, columns: Collection[str], text_column: str, filters: Filters) -> None:
    """Raise UserError where the text's column or a filter's is not among those that ``name`` has."""
    mends = {text_column: "name the text's by --text-column"}
    mends |= {column: f"leave {option} out" for column, option in filters.options.items()}
    for column, mend in mends.items():
        if column not in columns:
            raise UserError(f"{name}: no column {column!r} (it has {', '.join(columns)}); {mend}")


def not_text(name: str, column: str, found: str) -> UserError:
    """The error for a column with something else than text."""
    return UserError(f"{name}: column {column!r}: {found} where text is expected; name the text's by --text-column")
