"""What a source is: files in order, cut into units that workers read on their own, each a stream of documents.

A document is its text in valid UTF-8, as bytes. Its order in the data set is that of the units, and within a unit that
in which it is read: nothing of it depends on workers or shares.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaresid.errors import UserError

# Longer documents are left out, as are longer lines of JSON: a worker's memory must stay under 1 GiB.
MOST_BYTES = 128 * 2**20
# About this much uncompressed text makes a unit.
UNIT_BYTES = 32 * 2**20
# About this much text, and at most so many rows, make a batch.
BATCH_BYTES = 2**20
BATCH_ROWS = 512

# A cluster's array of jobs has fewer.
MOST_SHARES = 10_000

# Why documents are left out; data_prep.sources.checked says when. "unreadable" counts segments, the others documents.
DROPPED = ("empty", "bad_rows", "invalid_utf8", "too_long", "other_language", "low_score", "unreadable")
Tally = Counter[str]


class Unreadable(UserError):
    """A file that cannot be read, in whole or from some place on: what --skip-unreadable passes over."""

    def __init__(self, name: str, what: str | BaseException):
        if isinstance(what, OSError) and what.errno:
            what = os.strerror(what.errno)
        first = next(iter(str(what).splitlines()), type(what).__name__)
        super().__init__(f"{name}: cannot be read ({first}); get a good copy, leave it out, or use --skip-unreadable")
        self.name, self.what = name, first

    def __reduce__(self):
        return type(self), (self.name, self.what)


@dataclass(frozen=True)
class File:
    """One file of a source, known from a listing and not yet opened.

    ``name`` is what errors call it: the path as given, or the path in the repository. ``stamp`` changes when the file
    does: the time of the last change of a local file in ns, the blob id of a file on the Hub.
    """

    name: str
    bytes: int
    stamp: str


@dataclass(frozen=True)
class Segment:
    """A range of one local file: [first, last) in bytes (jsonl) or row groups (parquet), 0 and 0 for the whole.

    ``size`` is that of the whole file, in bytes, when it was listed; None where it is not held to that.
    """

    path: Path
    name: str
    first: int = 0
    last: int = 0
    size: int | None = None

    def check_size(self) -> None:
        """Raise Unreadable where the file is longer or shorter than when it was listed."""
        if self.size is not None and (size := self.path.stat().st_size) != self.size:
            raise Unreadable(self.name, f"{size} bytes, and {self.size} when it was listed")


@dataclass(frozen=True)
class Unit:
    """What one worker reads at once, and makes one part of.

    A group is one large file or a run of small ones, and ``index`` counts its units. ``position`` is the number of
    the source's bytes before this unit, ``bytes`` the number that it covers.
    """

    group: int
    index: int
    position: int
    bytes: int
    segments: tuple[Segment, ...]

    @property
    def name(self) -> str:
        """The stem of its part's files; names sort as units do."""
        return f"{self.group:06d}-{self.index:06d}"


@dataclass(frozen=True)
class Batch:
    """Documents that were read together, at least one, and how many bytes of the unit have been read with them."""

    documents: list[bytes]
    position: int


@dataclass(frozen=True)
class Share:
    """The units of machine ``number`` (from 1) of ``of``: those that begin in its part of the source's bytes."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """A share from "2/4"; UserError for anything else."""
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of) <= MOST_SHARES):
            raise UserError(
                f"--partition {text}: must be i/n with i from 1 to n (at most {MOST_SHARES}), e.g. 2/4 for the second "
                "of four"
            )
        return cls(int(number), int(of))

    def has(self, position: int, total: int) -> bool:
        """Whether a unit at this position, in a source of ``total`` bytes, is of this share."""
        return self._at(position, total) == self.number

    def meets(self, position: int, bytes: int, total: int) -> bool:
        """Whether a unit of this share can begin among these bytes."""
        return self._at(position, total) <= self.number <= self._at(position + max(bytes, 1) - 1, total)

    def _at(self, position: int, total: int) -> int:
        # Empty files at the end begin where the source ends: they are of the last share.
        return min(position * self.of // max(total, 1), self.of - 1) + 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


WHOLE = Share(1, 1)


class Reader:
    """Reads units; a copy of it lives in every worker, so it is small and can be pickled."""

    def read(self, unit: Unit, tally: Tally) -> Iterator[Batch]:
        """The documents of the unit in order, a batch at a time; those left out are counted in ``tally``.

        Raises Unreadable naming the file, and UserError for what looks like a wrong option.
        """
        raise NotImplementedError

    def cut(self, file: File, path: Path) -> Iterator[tuple[Segment, int]]:
        """A large file in segments, each with the bytes of the file that it covers; their sum is the file's size."""
        yield Segment(path, file.name), file.bytes


class Source:
    """The files of a source in order, and what reads them."""

    kind: str
    download_folder: Path | None = None

    def __init__(self, files: list[File], reader: Reader):
        self.files, self.reader = files, reader
        self.bytes = sum(file.bytes for file in files)

    def fetch(self, file: File) -> Path:
        """Where the file is on this machine."""
        return Path(file.name)

    def units(self, share: Share = WHOLE) -> Iterator[Unit]:
        """The units of a share, in order. Only files with units of the share are fetched, each when it is needed."""
        # Here, as it needs what stands above.
        from data_prep.sources.grouping import units_of

        return units_of(self.files, self.fetch, self.reader.cut, share)

    def download_bytes(self, share: Share = WHOLE) -> int:
        """What a share has to download to ``download_folder`` before it can be read."""
        return 0

    def check_unchanged(self) -> None:
        """Raise UserError for a local file that was changed since it was listed."""
        for file in self.files:
            status = Path(file.name).stat()
            if (status.st_size, str(status.st_mtime_ns)) != (file.bytes, file.stamp):
                raise UserError(f"{file.name}: changed while the job read it; delete --out and start anew")

    def describe(self, documents_sha256: str) -> dict[str, str]:
        """What the manifest says of the source; ``documents_sha256`` is the hash of the documents as they came."""
        return {"kind": self.kind, "revision": f"sha256:{documents_sha256}"}
