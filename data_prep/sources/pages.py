"""The sizes of a Parquet column's pages, which bound what reading it takes and which no library tells.

Pages follow each other, each after a PageHeader in Thrift's compact protocol
(https://github.com/apache/parquet-format, parquet.thrift).
"""

import os
from collections.abc import Iterator
from typing import BinaryIO

# Fields of PageHeader.
TYPE, UNCOMPRESSED_SIZE, COMPRESSED_SIZE, DICTIONARY_HEADER = 1, 2, 3, 7
DICTIONARY_PAGE = 2
# A field of DictionaryPageHeader.
NUM_VALUES = 1
# Thrift's types: those that hold nothing further (true, false), one byte, or a variable number of them.
EMPTY, BYTE, VARINTS, DOUBLE, BINARY, LISTS, MAP, STRUCT, UUID = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 11, 12, 13
# Headers are two or three structs deep.
DEEPEST = 16


def page_sizes(file: BinaryIO, start: int, end: int) -> Iterator[int]:
    """The uncompressed bytes of each page between two offsets in the file, that of a dictionary among them.

    Raises OSError where there are no headers of pages.
    """
    while start < end:
        file.seek(start)
        header = _integers(file, DEEPEST)
        size, stored = header.get(UNCOMPRESSED_SIZE, -1), header.get(COMPRESSED_SIZE, -1)
        if size < 0 or stored < 0:
            raise OSError("the header of a page is damaged")
        yield size
        start = file.tell() + stored


def dictionary_values(file: BinaryIO, start: int) -> int:
    """How many values the dictionary has whose page begins at this offset; 0 where another page does.

    Raises OSError where there is no header of a page.
    """
    file.seek(start)
    header = _integers(file, DEEPEST)
    return header.get(DICTIONARY_HEADER, {}).get(NUM_VALUES, 0) if header.get(TYPE) == DICTIONARY_PAGE else 0


def _integers(file: BinaryIO, deepest: int) -> dict:
    """The fields of the struct that begins here that are integers, or structs (a dict of the same kind) with them; the
    file is left at its end."""
    if not deepest:
        raise OSError("the header of a page is damaged")
    found, field = {}, 0
    while head := _byte(file):
        kind = head & 15
        field = field + (head >> 4) if head >> 4 else _zigzag(_varint(file))
        if kind in VARINTS:
            found[field] = _zigzag(_varint(file))
        elif kind == STRUCT:
            found[field] = _integers(file, deepest - 1)
        elif kind not in EMPTY:
            _skip(file, kind, deepest)
    return found


def _skip(file: BinaryIO, kind: int, deepest: int) -> None:
    """Pass over a value; in lists and maps, where true and false are a byte each, too."""
    if kind in VARINTS:
        _varint(file)
    elif kind == BYTE or kind in EMPTY:
        _byte(file)
    elif kind in (DOUBLE, UUID):
        file.seek(8 if kind == DOUBLE else 16, os.SEEK_CUR)
    elif kind == BINARY:
        file.seek(_varint(file), os.SEEK_CUR)
    elif kind in LISTS:
        head = _byte(file)
        for _ in range(head >> 4 if head >> 4 < 15 else _varint(file)):
            _skip(file, head & 15, deepest - 1)
    elif kind == MAP:
        if count := _varint(file):
            kinds = _byte(file)
            for _ in range(count):
                _skip(file, kinds >> 4, deepest - 1)
                _skip(file, kinds & 15, deepest - 1)
    elif kind == STRUCT:
        _integers(file, deepest - 1)
    else:
        raise OSError("the header of a page is damaged")


def _byte(file: BinaryIO) -> int:
    byte = file.read(1)
    if not byte:
        raise OSError("the header of a page is cut short")
    return byte[0]


def _varint(file: BinaryIO) -> int:
    result = 0
    for shift in range(0, 64, 7):
        byte = _byte(file)
        result |= (byte & 127) << shift
        if byte < 128:
            return result
    raise OSError("the header of a page is damaged")


def _zigzag(number: int) -> int:
    return number >> 1 ^ -(number & 1)
