"""Megatron's indexed data set: PREFIX.bin with the ids, PREFIX.idx saying where sequences and documents lie.

The index is, little-endian: b"MMIDIDX\\0\\0", uint64 version 1, uint8 code of the ids' type (uint16 8, int32 4), uint64
number of sequences, uint64 number of entries in the last table; int32 tokens of each sequence; int64 byte in the .bin
where each begins; int64 numbers of the sequences where documents begin, and the number of all sequences at the end.
What we write has one sequence a document, <|endoftext|> at its end: as tools/preprocess_data.py does by --append-eod.
"""

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.formats.found import split_in_name
from data_prep.formats.ids import appearing, read_raw_ids
from data_prep.tokenizer import END_OF_TEXT
from megaresid.data.manifest import Counts, Split
from megaresid.data.shards import TOKEN
from megaresid.errors import UserError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
LENGTH, POINTER = np.dtype("<i4"), np.dtype("<i8")
UINT16 = 8
DTYPES = {UINT16: TOKEN, 4: np.dtype("<i4")}
OTHER_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 5: "int64", 6: "float64", 7: "float32"}
MOST_LENGTH = 2**31 - 1
SUFFIXES = (".bin", ".idx")
# Entries of a table that are held at once.
AT_ONCE = 2**18


@dataclass(frozen=True)
class Index:
    """What PREFIX.idx says, checked; its tables stay in the file. ``entries`` is documents + 1."""

    path: Path
    dtype: np.dtype
    sequences: int
    entries: int
    tokens: int

    def lengths(self, first: int, last: int) -> np.ndarray:
        """int32[last - first] tokens of sequences [first, last)."""
        return self._table(HEADER.size, LENGTH, first, last)

    def pointers(self, first: int, last: int) -> np.ndarray:
        """int64[last - first] bytes of the .bin where sequences [first, last) begin."""
        return self._table(HEADER.size + LENGTH.itemsize * self.sequences, POINTER, first, last)

    def documents(self, first: int, last: int) -> np.ndarray:
        """int64[last - first] sequences where documents [first, last) begin; the one after the last counts too."""
        return self._table(HEADER.size + (LENGTH.itemsize + POINTER.itemsize) * self.sequences, POINTER, first, last)

    def _table(self, start: int, dtype: np.dtype, first: int, last: int) -> np.ndarray:
        return np.fromfile(self.path, dtype, last - first, offset=start + first * dtype.itemsize)


def find(folder: Path) -> dict[Split, list[Path]]:
    """The .bin files of each split, by ``train`` or ``val`` in their names, in the order of these.

    Raises UserError for a folder without any, and a .bin or .idx without the other.
    """
    found: dict[Split, list[Path]] = {}
    paths = sorted({path.with_suffix(".bin") for path in folder.iterdir() if path.suffix in (".bin", ".idx")})
    for path in paths:
        for needed in (path, path.with_suffix(".idx")):
            if not needed.is_file():
                raise UserError(f"{needed}: missing; a Megatron data set is a .bin and an .idx of one name")
        found.setdefault(split_in_name(path), []).append(path)
    if not found:
        raise UserError(f"{folder}: no .bin and .idx in it; name a folder with Megatron's indexed data sets")
    return dict(sorted(found.items()))


def check(path: Path) -> int:
    """The bytes that ``read`` will read of the data set in ``path``, its .bin; raises as ``open_index`` does."""
    open_index(path)
    return path.stat().st_size


def open_index(path: Path) -> Index:
    """Read and check the index of the data set in ``path``, its .bin.

    Raises UserError for another format or version, ids of another type than uint16 and int32, a size that does not fit,
    sequences that do not lie one after another and fill the .bin, and documents out of order.
    """
    idx = path.with_suffix(".idx")
    with open(idx, "rb") as file:
        header = file.read(HEADER.size)
        bytes_there = os.fstat(file.fileno()).st_size
    if not header.startswith(MAGIC):
        raise UserError(f"{idx}: not an index of Megatron's, it does not begin with {MAGIC!r}")
    if len(header) < HEADER.size:
        raise UserError(f"{idx}: cut short within its header of {HEADER.size} bytes; copy it again")
    _, version, code, sequences, entries = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{idx}: version {version} of Megatron's index; only version {VERSION} is read")
    if code not in DTYPES:
        raise UserError(
            f"{idx}: its ids are of type {OTHER_DTYPES.get(code, f'code {code}')}; only uint16 and int32 are read"
        )
    needed = HEADER.size + (LENGTH.itemsize + POINTER.itemsize) * sequences + POINTER.itemsize * entries
    if bytes_there == needed + sequences and sequences:
        raise UserError(f"{idx}: has modes of sequences (multimodal data); only text can be used")
    if bytes_there != needed:
        change = "cut short" if bytes_there < needed else "too long"
        raise UserError(
            f"{idx}: {change}, {bytes_there} bytes where {sequences} sequences and {entries} entries for documents "
            f"need {needed}; copy it again"
        )
    index = Index(idx, DTYPES[code], sequences, entries, path.stat().st_size // DTYPES[code].itemsize)
    _check_sequences(index, path)
    _check_documents(index)
    if not index.tokens:
        raise UserError(f"{path}: has no tokens; delete it and its index")
    return index


def read(path: Path, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The ids of the data set in ``path``, its .bin, as uint16[n] blocks with <|endoftext|> after each document.

    ``advance`` is told the bytes of each block. A document without <|endoftext|> gets it; one without tokens is
    nothing. Raises as ``open_index`` does, and for ids that are not GPT-2's.
    """
    index = open_index(path)
    ends = _document_ends(index)
    position, pending = 0, np.empty(0, POINTER)
    for block in read_raw_ids(path, index.dtype, advance):
        while not len(pending) or pending[-1] < position + len(block):
            more = next(ends, None)
            if more is None:
                break
            pending = np.concatenate([pending, more])
        here = np.searchsorted(pending, position + len(block), side="right")
        within = pending[:here] - position
        yield np.insert(block, within[block[within - 1] != END_OF_TEXT], END_OF_TEXT)
        position, pending = position + len(block), pending[here:]


def write(folder: Path, split: Split, blocks: Iterable[np.ndarray], end_of_text: int) -> Counts:
    """Write the split's .bin and .idx from uint16[n] blocks with ``end_of_text`` after each document.

    Raises UserError for a document that is longer than the index can say.
    """
    documents = tokens = begun = 0
    with appearing(folder / f"{split}.idx") as idx, appearing(folder / f"{split}.bin") as file:
        idx.write(bytes(HEADER.size))
        for block in blocks:
            file.write(block)
            ends = tokens + 1 + np.flatnonzero(block == end_of_text)
            lengths = np.diff(ends, prepend=begun)
            if lengths.max(initial=0) > MOST_LENGTH:
                raise UserError(f"{split}: a document of {lengths.max()} tokens; Megatron has at most {MOST_LENGTH}")
            idx.write(lengths.astype(LENGTH))
            documents += len(ends)
            begun = int(ends[-1]) if len(ends) else begun
            tokens += len(block)
        byte = 0
        for first in range(0, documents, AT_ONCE):
            idx.seek(HEADER.size + LENGTH.itemsize * first)
            count = min(AT_ONCE, documents - first)
            lengths = np.frombuffer(idx.read(LENGTH.itemsize * count), LENGTH)
            ends = byte + TOKEN.itemsize * np.cumsum(lengths, dtype=POINTER)
            idx.seek(HEADER.size + LENGTH.itemsize * documents + POINTER.itemsize * first)
            idx.write(ends - TOKEN.itemsize * lengths)
            byte = int(ends[-1])
        idx.seek(0, os.SEEK_END)
        for first in range(0, documents + 1, AT_ONCE):
            idx.write(np.arange(first, min(first + AT_ONCE, documents + 1), dtype=POINTER))
        idx.seek(0)
        idx.write(HEADER.pack(MAGIC, VERSION, UINT16, documents, documents + 1))
    return Counts(documents=documents, tokens=tokens)


def _check_sequences(index: Index, path: Path) -> None:
    byte = 0
    for first in range(0, index.sequences, AT_ONCE):
        last = min(first + AT_ONCE, index.sequences)
        lengths, pointers = index.lengths(first, last).astype(POINTER), index.pointers(first, last)
        ends = byte + index.dtype.itemsize * np.cumsum(lengths)
        starts = ends - index.dtype.itemsize * lengths
        if (bad := np.flatnonzero((lengths < 0) | (starts != pointers))).size:
            wrong = int(bad[0])
            raise UserError(
                f"{index.path}: sequence {first + wrong} has {lengths[wrong]} tokens from byte {pointers[wrong]}, and "
                f"the ones before it end at {starts[wrong]}; make the index again"
            )
        byte = int(ends[-1])
    found = path.stat().st_size
    if found != byte:
        raise UserError(f"{path}: {found} bytes where {index.path.name} says {byte}; copy both again")


def _check_documents(index: Index) -> None:
    before = 0
    for first in range(0, index.entries, AT_ONCE):
        starts = index.documents(first, min(first + AT_ONCE, index.entries))
        wrong = (first == 0 and starts[0] != 0) or (np.diff(starts, prepend=before) < 0).any()
        before = int(starts[-1])
        if wrong:
            break
    if not index.entries or wrong or before != index.sequences:
        raise UserError(
            f"{index.path}: its documents do not lead from sequence 0 to {index.sequences}; make the index again"
        )


def _document_ends(index: Index) -> Iterator[np.ndarray]:
    """int64[n] positions in tokens, n > 0, where documents with tokens end, rising."""
    before = 0
    for first in range(1, index.entries, AT_ONCE):
        sequences = index.documents(first, min(first + AT_ONCE, index.entries))
        while len(sequences):
            # Sequences of a document may be many: the table is read in runs of at most AT_ONCE.
            start = int(sequences[0])
            count = np.searchsorted(sequences, start + AT_ONCE)
            run, sequences = sequences[:count], sequences[count:]
            pointers = index.pointers(start, min(start + AT_ONCE, index.sequences))
            ends = np.append(pointers // index.dtype.itemsize, index.tokens)[run - start]
            ends = ends[np.diff(ends, prepend=before) > 0]
            if len(ends):
                before = int(ends[-1])
                yield ends
