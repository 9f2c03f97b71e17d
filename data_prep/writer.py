"""Writes the shards of one split."""

import contextlib
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedRandom
from pathlib import Path

import numpy as np

from megaresid.data.manifest import ShardEntry, Split
from megaresid.data.shards import HEADER_BYTES, TOKEN, TOKEN_BYTES, pack_header
from megaresid.durable import forget


class ShardWriter:
    """Appends ids to ``{split}_000000.bin``, ``{split}_000001.bin``, ..., each with at most ``shard_tokens`` of them.

    Documents run on from one shard into the next. A shard's header is written when it is full or the split ends,
    so a file that was not finished is not a shard. A full shard is put on the disk and its checksum taken by a thread
    while the next one fills. Existing files are never overwritten (FileExistsError). Any other OSError, as of a full
    disk, comes out of ``append`` or at the latest of ``finish``.
    """

    def __init__(self, folder: Path, split: Split, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.paths: list[Path] = []
        self.entries: list[ShardEntry] = []
        self._file: BufferedRandom | None = None
        self._thread = ThreadPoolExecutor(1)
        self._finishing: Future[ShardEntry] | None = None

    def append(self, ids: np.ndarray) -> None:
        """Write uint16[n] ids, n >= 0, opening the next shard when one is full."""
        while len(ids):
            if self._file is None:
                self._open()
            part = ids[: self.shard_tokens - self._tokens]
            self._file.write(np.ascontiguousarray(part, TOKEN))
            self._tokens += len(part)
            self._largest = max(self._largest, int(part.max()))
            ids = ids[len(part) :]
            if self._tokens == self.shard_tokens:
                self._close()

    def finish(self) -> list[ShardEntry]:
        """End the split; one entry for the manifest per shard, in order."""
        if self._file is not None:
            self._close()
        self._wait()
        self._thread.shutdown()
        return self.entries

    def discard(self) -> None:
        """Delete what was written."""
        self._thread.shutdown()
        if self._file is not None:
            # Closing flushes, which fails where the disk is full.
            with contextlib.suppress(OSError):
                self._file.close()
        for path in self.paths:
            path.unlink(missing_ok=True)

    def _open(self) -> None:
        path = self.folder / f"{self.split}_{len(self.paths):06d}.bin"
        self._file = open(path, "x+b")
        self.paths.append(path)
        self._file.write(bytes(HEADER_BYTES))
        self._tokens = self._largest = 0

    def _close(self) -> None:
        """Hand the shard to the thread, when that is done with the one before: no more than two are ever open."""
        self._wait()
        self._finishing = self._thread.submit(self._finished, self._file, self.paths[-1], self._tokens, self._largest)
        self._file = None

    def _wait(self) -> None:
        if self._finishing is not None:
            self.entries.append(self._finishing.result())
            self._finishing = None

    def _finished(self, file: BufferedRandom, path: Path, tokens: int, largest: int) -> ShardEntry:
        """The checksum is of what the file holds, read back, not of what was meant to be written."""
        with file:
            file.seek(0)
            file.write(pack_header(tokens))
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            forget(file)
        return ShardEntry(
            name=path.name,
            split=self.split,
            tokens=tokens,
            bytes=HEADER_BYTES + TOKEN_BYTES * tokens,
            sha256=checksum,
            largest_id=largest,
        )
