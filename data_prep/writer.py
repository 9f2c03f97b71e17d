"""Writes the shards of one split."""

import hashlib
import os
from pathlib import Path

import numpy as np

from megaresid.data.manifest import ShardEntry, Split
from megaresid.data.shards import HEADER_BYTES, TOKEN, TOKEN_BYTES, pack_header


class ShardWriter:
    """Appends ids to ``{split}_000000.bin``, ``{split}_000001.bin``, ..., each with at most ``shard_tokens`` of them.

    Documents run on from one shard into the next. A shard's header is written when it is full or the split ends,
    so a file that was not finished is not a shard. Existing files are never overwritten (FileExistsError).
    """

    def __init__(self, folder: Path, split: Split, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.paths: list[Path] = []
        self.entries: list[ShardEntry] = []
        self._file = None

    def append(self, ids: np.ndarray) -> None:
        """Write uint16[n] ids, n >= 0, opening the next shard when one is full."""
        while len(ids):
            if self._file is None:
                self._open()
            part = ids[: self.shard_tokens - self._tokens]
            self._file.write(part.astype(TOKEN, copy=False).tobytes())
            self._tokens += len(part)
            self._largest = max(self._largest, int(part.max()))
            ids = ids[len(part) :]
            if self._tokens == self.shard_tokens:
                self._finish()

    def finish(self) -> list[ShardEntry]:
        """End the split; one entry for the manifest per shard, in order."""
        if self._file is not None:
            self._finish()
        return self.entries

    def discard(self) -> None:
        """Delete what was written."""
        if self._file is not None:
            self._file.close()
        for path in self.paths:
            path.unlink()

    def _open(self) -> None:
        path = self.folder / f"{self.split}_{len(self.paths):06d}.bin"
        self._file = open(path, "x+b")
        self.paths.append(path)
        self._file.write(bytes(HEADER_BYTES))
        self._tokens = self._largest = 0

    def _finish(self) -> None:
        """The checksum is of what the file holds, read back, not of what was meant to be written."""
        with self._file as file:
            file.seek(0)
            file.write(pack_header(self._tokens))
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        self._file = None
        self.entries.append(
            ShardEntry(
                name=self.paths[-1].name,
                split=self.split,
                tokens=self._tokens,
                bytes=HEADER_BYTES + TOKEN_BYTES * self._tokens,
                sha256=checksum,
                largest_id=self._largest,
            )
        )
