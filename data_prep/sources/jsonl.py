"""Lines of JSON, each an object with the text in one field."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic_core import from_json

from data_prep.sources.batches import in_batches
from data_prep.sources.checked import Filters, check_bad_rows, check_columns, is_utf8, not_text, refusal
from data_prep.sources.find_files import find_files
from data_prep.sources.long_line import fields
from data_prep.sources.source import (
    MOST_BYTES,
    UNIT_BYTES,
    Batch,
    File,
    Reader,
    Segment,
    Source,
    Tally,
    Unit,
    Unreadable,
)
from data_prep.sources.streams import COMPRESSED, open_stream
from megaresid.errors import UserError

SKIP_BYTES = 2**20
# As objects, a line of this size fills up to 200 MB.
LONG_BYTES = 8 * 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MISSING = object()
# An escaped backslash and a whole pair are passed over; the group is half a pair.
HALF_PAIRS = re.compile(rb"\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)")


@dataclass(frozen=True)
class JsonReader(Reader):
    """Reads lines; a plain file is cut at byte offsets, where a line is of the segment that its first byte is in."""

    column: str
    filters: Filters = Filters()

    def read(self, unit: Unit, tally: Tally) -> Iterator[Batch]:
        return in_batches(self._documents(unit, tally))

    def cut(self, file: File, path: Path) -> Iterator[tuple[Segment, int]]:
        if file.name.endswith(COMPRESSED):
            yield from super().cut(file, path)
            return
        for first in range(0, file.bytes, UNIT_BYTES):
            last = min(first + UNIT_BYTES, file.bytes)
            yield Segment(path, file.name, first, last), last - first

    def _documents(self, unit: Unit, tally: Tally) -> Iterator[tuple[bytes, int]]:
        before = rows = 0
        dropped: Tally = Counter()
        for segment in unit.segments:
            first = segment.first == 0
            with open_stream(segment.path, segment.name) as (stream, file):
                for line in lines(stream, segment):
                    rows += 1
                    row, reason = self._row(line)
                    if first and reason is None and len(line) < LONG_BYTES:
                        self._check_first(row, segment.name)
                        first = False
                    del line
                    document, reason = (None, reason) if reason else self._document(row)
                    del row
                    if reason:
                        dropped[reason] += 1
                    else:
                        yield document, min(before + file.tell() - segment.first, unit.bytes)
                    del document
                before += file.tell() - segment.first
        tally.update(dropped)
        check_bad_rows(unit, rows, dropped)

    def _row(self, line: bytes | None) -> tuple[object, str | None]:
        """The value of a line, or why it is left out."""
        if line is None:
            return None, "too_long"
        try:
            if len(line) < LONG_BYTES:
                return parse(line), None
            return fields(line, self.column, self.filters.options, parse), None
        except ValueError:
            return None, "bad_rows" if is_utf8(line) else "invalid_utf8"

    def _document(self, row: object) -> tuple[bytes | None, str | None]:
        """The document in a row, or why it is left out."""
        text = row.get(self.column, MISSING) if isinstance(row, dict) else MISSING
        if not isinstance(text, str | bytes | None):
            return None, "bad_rows"
        if reason := self.filters.reason(row):
            return None, reason
        # A str is valid, so it is quickly checked; from a long line come bytes.
        if isinstance(text, bytes):
            return text, refusal(text)
        if not text or text.isspace():
            return None, "empty"
        return text.encode(), None

    def _check_first(self, row: object, name: str) -> None:
        if not isinstance(row, dict):
            raise UserError(f"{name}: its first line is {type(row).__name__}, not an object; check --source")
        check_columns(f"{name}: its first row", row, self.column, self.filters)
        if not isinstance(text := row[self.column], str | None):
            raise not_text(f"{name}: its first row", self.column, type(text).__name__)


class JsonLines(Source):
    """Files of --input, those with one of the suffixes in folders."""

    kind = "jsonl"
    suffixes = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst", ".json.gz", ".json.zst")

    @classmethod
    def open(cls, job) -> "JsonLines":
        return cls(find_files(job.input, cls.suffixes), JsonReader(job.text_column, Filters.of(job)))


def lines(stream: BinaryIO, segment: Segment) -> Iterator[bytes | None]:
    """The lines of a segment that are not blank, each with its line feed; None for one longer than MOST_BYTES."""
    position, last = segment.first, segment.last
    if position:
        # What is left of the line before: nothing but a line feed where it ends here.
        stream.seek(position - 1)
        position += _skip_line(stream, last - position + 1) - 1
    while not last or position < last:
        line = stream.readline(MOST_BYTES + 1)
        if not line and position < last:
            raise Unreadable(segment.name, "shorter than when it was listed")
        if not line:
            return
        start, position = position, position + len(line)
        if start == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line) > MOST_BYTES and not line.endswith(b"\n"):
            position += _skip_line(stream, last - position if last else None)
            yield None
        elif not line.isspace():
            yield line
        del line


def _skip_line(stream: BinaryIO, most: int | None) -> int:
    """Read to the end of a line, or of the stream, or somewhat beyond ``most`` bytes; the number of bytes read."""
    skipped = 0
    while most is None or skipped < most:
        part = stream.readline(SKIP_BYTES)
        skipped += len(part)
        if not part or part.endswith(b"\n"):
            break
    return skipped


def parse(line: bytes) -> object:
    """The value of a line, half surrogate pairs as U+FFFD; ValueError where it is not JSON in UTF-8."""
    try:
        return from_json(line, cache_strings="keys")
    except ValueError:
        mended = HALF_PAIRS.sub(lambda match: rb"\ufffd" if match[1] else match[0], line)
        if mended == line:
            raise
        return from_json(mended, cache_strings="keys")
