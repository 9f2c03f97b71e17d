"""The serial step: parts in the order of the source become the shards of the two splits."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.dedup import SeenDigests
from data_prep.parts import PartRecord, read_blocks
from data_prep.writer import ShardWriter
from megaresid.data.manifest import Counts, ShardEntry

SPLITS = ("train", "val")
SEEN = "seen"
# Runs of documents shorter than this, in tokens and by the mean, cost more to write one by one than to copy.
SHORT_RUN = 4096


@dataclass(frozen=True)
class Cut:
    """The options that decide what the shards take of the parts."""

    shard_tokens: int
    validation_fraction: float
    deduplicate: bool = False
    limit_tokens: int | None = None

    @property
    def threshold(self) -> int:
        return int(self.validation_fraction * 2**64)

    @property
    def split_rule(self) -> str:
        return f"val where the first 8 bytes of sha256(text in UTF-8), big-endian, are below {self.threshold}"


@dataclass(frozen=True)
class Assembled:
    """What was made: ``dropped`` by reason (with ``duplicates``), ``documents_sha256`` over the documents' sha256s."""

    shards: tuple[ShardEntry, ...]
    splits: dict[str, Counts]
    dropped: dict[str, int]
    runs_cut: int
    documents_sha256: str
    limited: bool
    backends: tuple[str, ...]
    proven_bytes: int


class Assembler:
    """Cuts the shards of ``out`` from parts that are given in the order of the source.

    Of documents with the same text (the first 128 bits of its sha256) the first is taken where ``cut`` says so.
    Documents are taken whole while both splits together stay within the limit in tokens; the first that would pass it
    ends the data set, and what came after the last one taken counts for nothing, but for what the workers left out
    and cut in the part where it ended. Memory holds one block of a part. Folder ``parts`` lends the place for the
    digests that were seen. As a context manager it deletes its shards where ``finish`` was not reached.
    """

    def __init__(self, out: Path, parts: Path, cut: Cut):
        self.cut = cut
        self.limited = False
        self._writers = {split: ShardWriter(out, split, cut.shard_tokens) for split in SPLITS}
        self._seen = SeenDigests(parts / SEEN) if cut.deduplicate else None
        self._documents, self._tokens = Counter(), Counter()
        self._dropped, self._runs_cut, self._proven_bytes = Counter(), 0, 0
        self._backends: set[str] = set()
        # Of all documents so far, and of those up to the last one taken.
        self._digests, self._duplicates = hashlib.sha256(), 0
        self._digests_taken, self._duplicates_taken = hashlib.sha256(), 0
        self._finished = False

    def __enter__(self) -> "Assembler":
        return self

    def __exit__(self, *error) -> None:
        if self._seen is not None:
            self._seen.close()
        if not self._finished:
            for writer in self._writers.values():
                writer.discard()

    @property
    def documents(self) -> int:
        """Documents taken so far."""
        return self._documents.total()

    @property
    def tokens(self) -> int:
        """Tokens taken so far."""
        return self._tokens.total()

    def add(self, record: PartRecord, folder: Path) -> bool:
        """Take the next part, which lies in ``folder``; False when the limit is reached: no more is wanted.

        Raises UserError for a damaged part, and OSError, as of a full disk.
        """
        if self.limited:
            return False
        self._dropped.update(record.dropped)
        self._runs_cut += record.runs_cut
        self._proven_bytes += record.proven_bytes
        self._backends.add(record.backend)
        for documents, ids in read_blocks(folder, record):
            self._add_block(np.ascontiguousarray(documents["digest"]), documents["tokens"].astype(np.int64), ids)
            if self.limited:
                return False
        return True

    def finish(self) -> Assembled:
        """End both splits. Raises OSError, as of a full disk."""
        if self.limited:
            self._digests, self._duplicates = self._digests_taken, self._duplicates_taken
        shards = [entry for split in SPLITS for entry in self._writers[split].finish()]
        self._finished = True
        return Assembled(
            shards=tuple(shards),
            splits={split: Counts(documents=self._documents[split], tokens=self._tokens[split]) for split in SPLITS},
            dropped=dict(self._dropped) | {"duplicates": self._duplicates},
            runs_cut=self._runs_cut,
            documents_sha256=self._digests.hexdigest(),
            limited=self.limited,
            backends=tuple(sorted(self._backends)),
            proven_bytes=self._proven_bytes,
        )

    def _add_block(self, digests: np.ndarray, lengths: np.ndarray, ids: np.ndarray) -> None:
        """Digests big-endian uint64[m, 4] and lengths int64[m] of the documents, ids uint16[sum of the lengths]."""
        taken = self._seen.add(digests) if self._seen is not None else np.ones(len(digests), bool)
        if self.cut.limit_tokens is not None:
            totals = self.tokens + np.cumsum(lengths * taken)
            over = np.flatnonzero(totals > self.cut.limit_tokens)
            if len(over):
                self.limited = True
                taken[over[0] :] = False
        self._count_read(digests, taken)
        held_out = digests[:, 0] < np.uint64(self.cut.threshold)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        for split, chosen in (("train", taken & ~held_out), ("val", taken & held_out)):
            if not chosen.any():
                continue
            self._documents[split] += int(np.count_nonzero(chosen))
            self._tokens[split] += int(lengths[chosen].sum())
            runs = bounds[runs_of(chosen)]
            # Long runs are not copied; many short ones are gathered first.
            if len(runs) * SHORT_RUN > len(ids):
                self._writers[split].append(ids[np.repeat(chosen, lengths)])
            else:
                for start, end in runs.tolist():
                    self._writers[split].append(ids[start:end])

    def _count_read(self, digests: np.ndarray, taken: np.ndarray) -> None:
        """Hash the digests and count the duplicates, up to the last document taken and up to the end."""
        if taken.any():
            upto = len(taken) - int(np.argmax(taken[::-1]))
            self._digests.update(digests[:upto].tobytes())
            self._duplicates += upto - int(np.count_nonzero(taken[:upto]))
            self._digests_taken, self._duplicates_taken = self._digests.copy(), self._duplicates
            digests, taken = digests[upto:], taken[upto:]
        self._digests.update(digests.tobytes())
        self._duplicates += len(taken)


def runs_of(chosen: np.ndarray) -> np.ndarray:
    """int64[r, 2]: where each run of true begins and ends (the place after it) in bool[n]."""
    return np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2)
