"""Parts: what a worker makes of a unit. Three files in one folder, complete when the record is there.

    NAME.ids   uint16, little-endian: the documents one after another, <|endoftext|> first in each
    NAME.docs  DOCUMENT, one row a document
    NAME.json  the completion record, written last

Both data files are cut into blocks of whole documents, each with a checksum.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from data_prep.sources.source import Unit
from megaresid.data.manifest import Record
from megaresid.durable import forget, write_text
from megaresid.errors import UserError

# The sha256 of the text as four big-endian words, and the number of ids with <|endoftext|>.
DOCUMENT = np.dtype([("digest", ">u8", (4,)), ("tokens", "<u4")])
IDS = np.dtype("<u2")
# A block ends with the documents that bring it to this.
BLOCK_TOKENS = 4 * 2**20


class Block(Record):
    """A run of whole documents; ``crc32`` is over its ids and then its rows."""

    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    crc32: int


class PartRecord(Record):
    """What a complete part holds.

    plan          sha256 of the plan that the part was made by
    position      bytes of the source before its unit, and ``bytes`` those that the unit covers
    text_bytes    UTF-8 bytes of its documents
    runs_cut      endless pre-tokens that were cut
    dropped       documents that were left out, by reason
    backend       what encoded; of ``proven_bytes`` of the text tiktoken was seen to give the same ids
    """

    name: str
    plan: str
    position: int
    bytes: int
    documents: int
    tokens: int
    text_bytes: int
    runs_cut: int
    dropped: dict[str, int]
    backend: str
    proven_bytes: int
    blocks: tuple[Block, ...]
    complete: Literal[True] = True


class PartWriter:
    """Writes the part of a unit. Remains of an earlier attempt are overwritten: without a record they are nothing."""

    def __init__(self, folder: Path, unit: Unit, plan: str):
        self.folder, self.unit, self.plan = folder, unit, plan
        self.documents = self.tokens = 0
        _path(folder, unit.name, "json").unlink(missing_ok=True)
        self._ids = open(_path(folder, unit.name, "ids"), "wb", buffering=0)
        self._docs = open(_path(folder, unit.name, "docs"), "wb", buffering=0)
        self._blocks: list[Block] = []
        self._start_block()

    def append(self, ids: np.ndarray, documents: np.ndarray) -> None:
        """Add uint16[n] ids, and the DOCUMENT[m] rows of the documents that end with them, m >= 0."""
        ids = np.ascontiguousarray(ids, IDS)
        _write(self._ids, ids)
        self._crc32 = zlib.crc32(ids, self._crc32)
        self._block_tokens += len(ids)
        if len(documents):
            self._rows.append(documents)
            if self._block_tokens >= BLOCK_TOKENS:
                self._end_block()

    def finish(
        self, *, text_bytes: int, runs_cut: int, dropped: dict[str, int], backend: str, proven_bytes: int
    ) -> PartRecord:
        """Make the part complete: the record appears when all else is on the disk."""
        if self._rows:
            self._end_block()
        for file in (self._ids, self._docs):
            os.fsync(file.fileno())
            file.close()
        record = PartRecord(
            name=self.unit.name,
            plan=self.plan,
            position=self.unit.position,
            bytes=self.unit.bytes,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=text_bytes,
            runs_cut=runs_cut,
            dropped=dropped,
            backend=backend,
            proven_bytes=proven_bytes,
            blocks=tuple(self._blocks),
        )
        write_text(_path(self.folder, record.name, "json"), record.model_dump_json() + "\n")
        return record

    def discard(self) -> None:
        """Delete what was written."""
        for file in (self._ids, self._docs):
            file.close()
        for ending in ("ids", "docs"):
            _path(self.folder, self.unit.name, ending).unlink(missing_ok=True)

    def _start_block(self) -> None:
        self._rows: list[np.ndarray] = []
        self._block_tokens = self._crc32 = 0

    def _end_block(self) -> None:
        # Without its dtype the result would be in native byte order.
        rows = np.concatenate(self._rows, dtype=DOCUMENT)
        _write(self._docs, rows)
        crc32 = zlib.crc32(rows.view(np.uint8), self._crc32)
        self._blocks.append(Block(documents=len(rows), tokens=self._block_tokens, crc32=crc32))
        self.documents += len(rows)
        self.tokens += self._block_tokens
        self._start_block()


def read_record(folder: Path, name: str, plan: str) -> PartRecord | None:
    """The record of a part that is complete and of this plan; None when there is none, or its files are not whole."""
    try:
        record = PartRecord.model_validate_json(_path(folder, name, "json").read_bytes())
        sizes = [_path(folder, name, ending).stat().st_size for ending in ("ids", "docs")]
    except (FileNotFoundError, ValidationError):
        return None
    whole = sizes == [record.tokens * IDS.itemsize, record.documents * DOCUMENT.itemsize]
    return record if whole and (record.name, record.plan) == (name, plan) else None


def read_blocks(folder: Path, record: PartRecord) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The part's blocks in order, one at a time in memory: DOCUMENT[m] rows, and uint16[n] ids.

    Raises UserError naming the part's file when they are not what was written.
    """
    names = [_path(folder, record.name, ending) for ending in ("ids", "docs")]
    try:
        with open(names[0], "rb") as ids_file, open(names[1], "rb") as docs_file:
            for block in record.blocks:
                ids = np.fromfile(ids_file, IDS, block.tokens)
                rows = np.fromfile(docs_file, DOCUMENT, block.documents)
                if zlib.crc32(rows.view(np.uint8), zlib.crc32(ids)) != block.crc32:
                    raise UserError(f"{names[0]}: damaged; delete {record.name}.json beside it and go on with --resume")
                yield rows, ids
            for file in (ids_file, docs_file):
                forget(file)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is gone; go on with --resume, which makes it again") from None


def _path(folder: Path, name: str, ending: str) -> Path:
    return folder / f"{name}.{ending}"


def _write(file, values: np.ndarray) -> None:
    """All of the array's bytes: a raw file may take only some at once."""
    data = memoryview(values.view(np.uint8)) if values.size else memoryview(b"")
    while data:
        data = data[file.write(data) :]
