"""Parquet files, one document a row: only the text's column and those of filters are read, by row groups."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from data_prep.sources.batches import in_batches
from data_prep.sources.checked import Filters, check_bad_rows, check_columns, not_text, refusal
from data_prep.sources.find_files import find_files
from data_prep.sources.pages import dictionary_values, page_sizes
from data_prep.sources.source import (
    BATCH_BYTES,
    BATCH_ROWS,
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
from megaresid.errors import UserError

BUFFER_BYTES = 2**20
# Reading a page takes up to four times its size: as it is stored, uncompressed, as an array, and as documents.
MOST_PAGE_BYTES = 192 * 2**20
MOST_AT_ONCE = 128 * 2**20
# In place of its last row group, marks a file whose footer could not be read when it was to be cut.
NOT_CUT = -1
# Row groups with less text are not worth a look at their pages.
SMALL_BYTES = 2**20
# The width of the offsets in each type that holds text.
WIDTHS = {
    pyarrow.string(): np.int32,
    pyarrow.binary(): np.int32,
    pyarrow.large_string(): np.int64,
    pyarrow.large_binary(): np.int64,
}


@dataclass(frozen=True)
class ParquetReader(Reader):
    """Reads row groups; a large file is cut into runs of them."""

    column: str
    filters: Filters = Filters()

    def cut(self, file: File, path: Path) -> Iterator[tuple[Segment, int]]:
        try:
            with open_table(path, file.name) as table:
                chunks = chunks_of(table, self.column, range(table.num_row_groups))
                sizes = [chunk.total_uncompressed_size for chunk in chunks]
        except Unreadable:
            # Reading it says what is wrong, and --skip-unreadable acts there. It must not be read after all, where the
            # trouble has passed: the next time the file would be cut.
            yield Segment(path, file.name, 0, NOT_CUT), file.bytes
            return
        total = sum(sizes)
        if not total:
            yield from super().cut(file, path)
            return
        first = first_byte = before = size = 0
        for last, more in enumerate(sizes, 1):
            size += more
            if size >= UNIT_BYTES or last == len(sizes):
                before += size
                byte = file.bytes * before // total
                yield Segment(path, file.name, first, last), byte - first_byte
                first, first_byte, size = last, byte, 0

    def read(self, unit: Unit, tally: Tally) -> Iterator[Batch]:
        return in_batches(self._documents(unit, tally))

    def _documents(self, unit: Unit, tally: Tally) -> Iterator[tuple[bytes, int]]:
        before = rows = 0
        dropped: Tally = Counter()
        for segment in unit.segments:
            with open_table(segment.path, segment.name) as table:
                self._check(table.schema_arrow, segment.name)
                if segment.last == NOT_CUT:
                    raise Unreadable(segment.name, "its footer could not be read before, and now can; start again")
                groups = range(segment.first, segment.last or table.num_row_groups)
                size = unit.bytes if len(unit.segments) == 1 else segment.path.stat().st_size
                expected, read = sum(table.metadata.row_group(group).num_rows for group in groups), 0
                for batch in self._batches(table, segment.path, groups):
                    read += len(batch)
                    position = min(before + size * read // expected, unit.bytes)
                    known_utf8 = is_all_utf8(batch.column(self.column))
                    for text in self._wanted(batch, dropped):
                        if reason := refusal(text, known_utf8):
                            dropped[reason] += 1
                        else:
                            yield text, position
                    # Neither may lie in memory while more is read.
                    batch = text = None
                if read != expected:
                    raise Unreadable(segment.name, f"{read} rows where its footer says {expected}")
            before += size
            rows += read
        tally.update(dropped)
        check_bad_rows(unit, rows, dropped)

    def _check(self, schema: pyarrow.Schema, name: str) -> None:
        check_columns(name, schema.names, self.column, self.filters)
        if schema.names.count(self.column) > 1:
            raise UserError(f"{name}: more than one column {self.column!r}; name another by --text-column")
        if not is_text(found := schema.field(self.column).type):
            raise not_text(name, self.column, str(found))

    def _batches(self, table: parquet.ParquetFile, path: Path, groups: range) -> Iterator[pyarrow.RecordBatch]:
        """The rows of the groups, some at a time: about BATCH_BYTES of text by the mean of their group."""
        for group, chunk in zip(groups, chunks_of(table, self.column, groups), strict=True):
            yield from table.iter_batches(
                batch_size=rows_at_once(chunk, path),
                row_groups=[group],
                columns=[self.column, *self.filters.options],
                use_threads=False,
            )

    def _wanted(self, batch: pyarrow.RecordBatch, dropped: Tally) -> Iterator[bytes]:
        """The texts that the filters want."""
        texts = texts_of(batch.column(self.column))
        if not self.filters.options:
            yield from texts
            return
        rows = batch.select(list(self.filters.options)).to_pylist()
        for text, row in zip(texts, rows, strict=True):
            if reason := self.filters.reason(row):
                dropped[reason] += 1
            else:
                yield text


class ParquetFiles(Source):
    """Files of --input, .parquet in folders."""

    kind = "parquet"
    suffixes = (".parquet",)

    @classmethod
    def open(cls, job) -> "ParquetFiles":
        return cls(find_files(job.input, cls.suffixes), ParquetReader(job.text_column, Filters.of(job)))


@contextmanager
def open_table(path: Path, name: str) -> Iterator[parquet.ParquetFile]:
    """The file, read a buffer at a time; what fails while it is open raises Unreadable with ``name``."""
    try:
        with parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True
        ) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise Unreadable(name, error) from None


def chunks_of(table: parquet.ParquetFile, column: str, groups: range) -> Iterator[parquet.ColumnChunkMetaData]:
    """What the footer says of a column in the row groups, nothing where it has no such column."""
    leaves = [leaf for leaf in range(len(table.schema)) if table.schema.column(leaf).path == column]
    for group in groups if leaves else ():
        yield table.metadata.row_group(group).column(leaves[0])


def rows_at_once(chunk: parquet.ColumnChunkMetaData, path: Path) -> int:
    """How many rows of a row group are BATCH_BYTES of text by the mean, and MOST_AT_ONCE at the very most.

    A row lies in one page, and can have no more bytes than its page and the dictionary's, however they are encoded.
    Raises OSError for a page larger than MOST_PAGE_BYTES.
    """
    rows = max(min(BATCH_BYTES * chunk.num_values // max(chunk.total_uncompressed_size, 1), BATCH_ROWS), 1)
    largest = chunk.total_uncompressed_size
    if largest > SMALL_BYTES:
        start = chunk.data_page_offset
        if chunk.has_dictionary_page and chunk.dictionary_page_offset:
            start = min(start, chunk.dictionary_page_offset)
        with open(path, "rb", buffering=512) as file:
            # No value comes twice: together they are no longer than they are stored.
            if largest <= MOST_AT_ONCE and dictionary_values(file, start) in (0, chunk.num_values):
                return rows
            largest = max(page_sizes(file, start, start + chunk.total_compressed_size), default=0)
    if largest > MOST_PAGE_BYTES:
        raise OSError(
            f"a page of {largest:,} bytes, too large for the memory of a worker; write the file with smaller pages"
        )
    return max(min(rows, MOST_AT_ONCE // max(largest, 1)), 1)


def is_text(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (*WIDTHS, pyarrow.string_view(), pyarrow.binary_view())


def is_all_utf8(column: pyarrow.Array) -> bool:
    """Whether all of a column of strings is UTF-8, which is quicker to see at once; False where it is not known."""
    if column.type not in (pyarrow.string(), pyarrow.large_string()):
        return False
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


def texts_of(column: pyarrow.Array) -> Iterator[bytes | memoryview]:
    """The values of a column as bytes, null as none, straight from its buffers: no str is made. What is too long to be
    a document comes as a view, not copied."""
    if column.type not in WIDTHS:
        column = column.cast(pyarrow.large_binary())
    width = WIDTHS[column.type]
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, width, len(column) + 1, column.offset * np.dtype(width).itemsize).tolist()
    bytes_of = memoryview(data or b"")
    valid = column.is_valid().to_pylist() if column.null_count else repeat(True)
    for (start, end), there in zip(pairwise(bounds), valid, strict=False):
        text = bytes_of[start:end] if there else b""
        yield bytes(text) if len(text) <= MOST_BYTES else text
