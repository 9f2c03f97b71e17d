"""The shard format, and reading tokens out of a folder of shards.

A shard is llm.c's version 1: a header of 256 int32 (magic, version, token count, zeros), then that many uint16
token ids, everything little-endian.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megaresid.errors import UserError

if TYPE_CHECKING:
    from megaresid.data.manifest import Manifest, ShardEntry, Split

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
TOKEN = np.dtype("<u2")
# The header counts tokens in an int32.
MOST_TOKENS = 2**31 - 1
# Far below the usual limit of 1024 open files, above the shards of a 10B-token data set.
OPEN_FILES = 128


def pack_header(tokens: int) -> bytes:
    """The 1024 bytes before ``tokens`` ids."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def parse_header(header: bytes, name: str) -> int:
    """The token count in a shard's first 1024 bytes.

    Raises UserError, naming the file ``name``, for a header cut short, a wrong magic or another version.
    """
    if len(header) < HEADER_BYTES:
        raise UserError(f"{name}: cut short, {len(header)} bytes where the header alone has {HEADER_BYTES}")
    magic, version, tokens = (int(value) for value in np.frombuffer(header, dtype="<i4", count=3))
    if magic != MAGIC:
        raise UserError(f"{name}: not a shard, its magic number is {magic} where a shard has {MAGIC}")
    if version != VERSION:
        raise UserError(f"{name}: shard version {version}; only version {VERSION} (uint16 ids) is read")
    return tokens


def check_shard(path: Path, entry: ShardEntry) -> None:
    """Compare header and size of the file with its line in the manifest, without reading the tokens.

    Raises UserError for a missing file, a wrong magic or version, and a size other than the recorded one.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f"{path}: missing, but the manifest lists it; copy it here again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a file that can be read") from None
    tokens = parse_header(header, str(path))
    if size != entry.bytes:
        change = "cut short" if size < entry.bytes else "too long"
        raise UserError(f"{path}: {change}, {size} bytes where the manifest says {entry.bytes}; copy it again")
    if tokens != entry.tokens:
        raise UserError(f"{path}: its header counts {tokens} tokens, the manifest {entry.tokens}; copy both again")


class TokenStream:
    """The tokens of one split as one sequence, in the order of its shards.

    Reads go through ``pread`` into the caller's array: mapped files would count every page ever touched as this
    process's memory. Several threads may read; a pickled or forked copy opens files of its own.
    """

    def __init__(self, folder: Path, shards: list[ShardEntry]):
        self.folder, self.shards = Path(folder), shards
        self.starts = [0, *accumulate(shard.tokens for shard in shards)]
        self._reset_files()

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, split: Split) -> TokenStream:
        """Check every shard of the split with ``check_shard``; raises UserError for those and for an empty split."""
        shards = manifest.shards(split)
        if not shards:
            raise UserError(f"data folder {folder}: it has no {split} shards; make it again with another split")
        for shard in shards:
            check_shard(Path(folder) / shard.name, shard)
        return cls(folder, shards)

    def __len__(self) -> int:
        return self.starts[-1]

    def locate(self, position: int) -> tuple[Path, int]:
        """(shard, token offset within it) of a position in the stream."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of a stream of {len(self)} tokens")
        shard = bisect_right(self.starts, position) - 1
        return self.folder / self.shards[shard].name, position - self.starts[shard]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream as uint16[length]; may span shards.

        Raises IndexError outside the stream, UserError when a file has shrunk since it was checked.
        """
        tokens = np.empty(length, dtype=TOKEN)
        self.read_into(start, tokens)
        return tokens

    def read_into(self, start: int, tokens: np.ndarray) -> None:
        """Like ``read``, into a contiguous uint16[length]."""
        end = start + len(tokens)
        if start < 0 or end > len(self):
            raise IndexError(f"tokens [{start}, {end}) of a stream of {len(self)}")
        while start < end:
            shard = bisect_right(self.starts, start) - 1
            part = tokens[: self.starts[shard + 1] - start]
            self._fill(shard, start - self.starts[shard], part)
            start, tokens = start + len(part), tokens[len(part) :]

    def read_windows(self, windows: np.ndarray, context: int) -> np.ndarray:
        """uint16[len(windows), context + 1]: window w is tokens [w*context, w*context + context + 1)."""
        tokens = np.empty((len(windows), context + 1), dtype=TOKEN)
        for row, window in zip(tokens, windows.tolist(), strict=True):
            self.read_into(window * context, row)
        return tokens

    def place(self, window: int, column: int, context: int) -> tuple[Path, int]:
        """(shard, token offset within it) of a token of a window."""
        return self.locate(window * context + column)

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def _fill(self, shard: int, offset: int, tokens: np.ndarray) -> None:
        position = HEADER_BYTES + TOKEN_BYTES * offset
        # One lock for finding and reading, or another thread could close the file in between.
        with self._lock:
            file = self._file(shard)
            count = os.preadv(file, [tokens], position)
            # One call may read less than was asked for, at most 2 GiB.
            while count < tokens.nbytes:
                more = os.preadv(file, [memoryview(tokens).cast("B")[count:]], position + count)
                if not more:
                    path = self.folder / self.shards[shard].name
                    raise UserError(f"{path}: cut short while in use at byte {position + count}", rank_local=True)
                count += more

    def _file(self, shard: int) -> int:
        """An open descriptor; the one used longest ago is closed when there are too many."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) == OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.folder / self.shards[shard].name, os.O_RDONLY)
        return self._files[shard]

    def _reset_files(self) -> None:
        self._lock, self._files = threading.Lock(), OrderedDict()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_files")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset_files()

    def __del__(self):
        if hasattr(self, "_files"):
            self.close()
