"""Streams of token ids: blocks of uint16[n], from and to files, with <|endoftext|> before or after each document."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.tokenizer import END_OF_TEXT, VOCAB_SIZE
from megaresid.data.shards import MAGIC, TOKEN
from megaresid.errors import UserError

# What is read at once: large enough to hide the cost of a call, small enough to cost no memory.
BLOCK_IDS = 2**21
# How files begin that are not raw ids, though they may be named like some.
FOREIGN = {
    MAGIC.to_bytes(4, "little"): "a shard of llm.c's form; python -m data_prep adopt takes a folder of those as it is",
    (20240801).to_bytes(4, "little"): "a shard of llm.c's form for Llama 3, whose ids are not GPT-2's; use GPT-2 data",
    b"\x93NUMPY": "an array of numpy's, not raw ids; write array.tobytes() to a file",
}


def read_blocks(file: BinaryIO, dtype: np.dtype = TOKEN) -> Iterator[np.ndarray]:
    """The rest of the file as dtype[n] blocks, n > 0; the last bytes that fill no id are dropped."""
    while data := file.read(BLOCK_IDS * dtype.itemsize):
        block = np.frombuffer(data, dtype=dtype, count=len(data) // dtype.itemsize)
        if len(block):
            yield block


def as_gpt2(ids: np.ndarray, path: Path, position: int) -> np.ndarray:
    """The ids from token ``position`` of ``path`` on as uint16; UserError for one outside GPT-2's vocabulary."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < VOCAB_SIZE:
        bad = int(np.flatnonzero((ids < 0) | (ids >= VOCAB_SIZE))[0])
        raise UserError(
            f"{path}: token {position + bad} is id {ids[bad]}, outside GPT-2's vocabulary of {VOCAB_SIZE}; "
            "only ids of the GPT-2 tokenizer can be used"
        )
    return ids.astype(TOKEN, copy=False)


def check_raw_ids(path: Path, dtype: np.dtype) -> int:
    """The bytes of a file of nothing but ids.

    Raises UserError for an empty file, one of another format, and a size that fits no number of ids.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(max(map(len, FOREIGN)))
    for mark, what in FOREIGN.items():
        if start.startswith(mark):
            raise UserError(f"{path}: {what}")
    if not size or size % dtype.itemsize:
        raise UserError(f"{path}: {size} bytes are no whole number of {dtype.itemsize}-byte ids; copy it again")
    return size


def read_raw_ids(path: Path, dtype: np.dtype, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The ids of a file that ``check_raw_ids`` has passed, as uint16[n] blocks; ``advance`` is told the bytes of each.

    Raises UserError for ids that are not GPT-2's.
    """
    position = 0
    with open(path, "rb") as file:
        for block in read_blocks(file, dtype):
            yield as_gpt2(block, path, position)
            position += len(block)
            advance(block.nbytes)


def ending_documents(blocks: Iterable[np.ndarray], end_of_text: int = END_OF_TEXT) -> Iterator[np.ndarray]:
    """From <|endoftext|> before each document to one after each.

    A stream that begins within a document has its rest as a document.
    """
    begun = False
    for block in blocks:
        yield block if begun or block[0] != end_of_text else block[1:]
        begun = True
    if begun:
        yield np.array([end_of_text], TOKEN)


def beginning_documents(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """From <|endoftext|> after each document, which the last may lack, to one before each."""
    last = None
    for block in blocks:
        yield np.array([END_OF_TEXT], TOKEN) if last is None else last
        yield block[:-1]
        last = block[-1:]
    if last is not None and last[0] != END_OF_TEXT:
        yield last


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for reading and writing, that has its name when the body ends well; else it is removed."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "x+b") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.rename(partial, path)
        except BaseException:
            partial.unlink()
            raise
