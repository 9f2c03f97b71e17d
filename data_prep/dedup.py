"""Exact duplicates: every digest that was seen, in sorted runs on disk."""

import mmap
import shutil
from pathlib import Path

import numpy as np

# Runs up to this many digests stay in memory (16 bytes each; all of them together are less than twice this).
MEMORY_DIGESTS = 2**21
# Digests that a merge on disk reads from each run at once.
MERGE_DIGESTS = 2**18
KEY = np.dtype("<u8")
# Of a run on disk, every so many first words stay in memory: those between two of them fill a page of the file.
STRIDE = 512
# Digests that are looked up between two releases of a run's pages: the system may map 64 KiB for each.
LOOKUPS = 2**11


class SeenDigests:
    """A set of documents by the first 128 bits of their sha256, which only grows.

    The digests stand in runs, each sorted by its first 64 bits. What comes in is a new run, and a run at least half as
    long as the one before it is merged with it: so there are about log2(n) runs, and each digest is written about
    log2(n / MEMORY_DIGESTS) times. ``folder`` holds the long ones, is emptied first, and is deleted by ``close``.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._runs: list[MemoryRun | DiskRun] = []
        self._made = 0
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests uint64[n, >= 2] of any byte order, of which the first two words count; bool[n] says which are
        new, being neither in the set nor earlier in ``digests``. Raises OSError, as of a full disk.
        """
        first, second = (np.ascontiguousarray(digests[:, word], KEY) for word in (0, 1))
        # Stable: of equal digests the first that came is the first of its group.
        order = np.lexsort((second, first))
        first, second = first[order], second[order]
        fresh = np.ones(len(order), bool)
        fresh[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        for run in self._runs:
            fresh &= ~run.holds(first, second)
        new = np.empty(len(order), bool)
        new[order] = fresh
        if fresh.any():
            self._push(MemoryRun(np.stack([first[fresh], second[fresh]])))
        return new

    def close(self) -> None:
        self._runs.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _push(self, run: "MemoryRun | DiskRun") -> None:
        self._runs.append(run)
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            b, a = self._runs.pop(), self._runs.pop()
            self._runs.append(self._merged(a, b))

    def _merged(self, a: "MemoryRun | DiskRun", b: "MemoryRun | DiskRun") -> "MemoryRun | DiskRun":
        if len(a) + len(b) <= MEMORY_DIGESTS:
            return MemoryRun(merge(a.read(0, len(a)), b.read(0, len(b))))
        self._made += 1
        path = self.folder / f"{self._made:06d}.run"
        index = write_merged(path, a, b)
        for run in (a, b):
            run.delete()
        return DiskRun(path, index, len(a) + len(b))


class MemoryRun:
    """Digests uint64[2, n], sorted by the first row."""

    def __init__(self, digests: np.ndarray):
        self.digests = digests

    def __len__(self) -> int:
        return self.digests.shape[1]

    def holds(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """bool[n]: which of the digests are in this run; ``first`` uint64[n] is sorted."""
        places = self._places(first)
        found = np.zeros(len(first), bool)
        # All whose first word is equal are looked through; of sha256 there is seldom more than one.
        open_ = np.arange(len(first))
        while len(open_):
            inside = places < len(self)
            open_, places = open_[inside], places[inside]
            equal = self.digests[0][places] == first[open_]
            open_, places = open_[equal], places[equal]
            same = self.digests[1][places] == second[open_]
            found[open_[same]] = True
            open_, places = open_[~same], places[~same] + 1
        return found

    def _places(self, first: np.ndarray) -> np.ndarray:
        """int64[n]: for each word the first place in the run that is not below it."""
        return np.searchsorted(self.digests[0], first)

    def read(self, start: int, end: int) -> np.ndarray:
        return self.digests[:, start:end]

    def delete(self) -> None:
        pass


class DiskRun(MemoryRun):
    """The same in a file: the first words of all digests, then the second words.

    ``index`` uint64 holds every STRIDE-th first word, so that a look-up reads one page.
    """

    def __init__(self, path: Path, index: np.ndarray, length: int):
        super().__init__(np.memmap(path, KEY, "r", shape=(2, length)))
        self.path, self.index = path, index
        # Reading around a page would be in vain.
        self.digests._mmap.madvise(mmap.MADV_RANDOM)

    def holds(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        found = np.empty(len(first), bool)
        for start in range(0, len(first), LOOKUPS):
            some = slice(start, start + LOOKUPS)
            found[some] = super().holds(first[some], second[some])
            # The pages stay in the system's cache, but no longer count as this process's memory.
            self.digests._mmap.madvise(mmap.MADV_DONTNEED)
        return found

    def _places(self, first: np.ndarray) -> np.ndarray:
        """Between two words of the index, by halving the range [low, high] for all digests at once."""
        high = STRIDE * np.searchsorted(self.index, first)
        low = np.maximum(0, high - (STRIDE - 1))
        high = np.minimum(high, len(self))
        while (undecided := np.flatnonzero(low < high)).size:
            middle = (low[undecided] + high[undecided]) // 2
            below = self.digests[0][middle] < first[undecided]
            low[undecided[below]] = middle[below] + 1
            high[undecided[~below]] = middle[~below]
        return low

    def read(self, start: int, end: int) -> np.ndarray:
        """Read, not mapped: a merge goes through the whole file."""
        offsets = (KEY.itemsize * start, KEY.itemsize * (len(self) + start))
        return np.stack([np.fromfile(self.path, KEY, end - start, offset=offset) for offset in offsets])

    def delete(self) -> None:
        self.path.unlink()


def merge(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Two runs uint64[2, n] and uint64[2, m] as one uint64[2, n + m], sorted by the first row."""
    places = np.searchsorted(a[0], b[0]) + np.arange(b.shape[1])
    of_a = np.ones(a.shape[1] + b.shape[1], bool)
    of_a[places] = False
    merged = np.empty((2, len(of_a)), KEY)
    merged[:, of_a] = a
    merged[:, places] = b
    return merged


def write_merged(path: Path, a: MemoryRun, b: MemoryRun) -> np.ndarray:
    """Merge two runs into a file, a piece at a time; returns the index of the new run."""
    index = []
    total = len(a) + len(b)
    rest_a = rest_b = np.empty((2, 0), KEY)
    read_a = read_b = written = 0
    with open(path, "xb") as file:
        while written < total:
            rest_a, read_a = filled(a, rest_a, read_a)
            rest_b, read_b = filled(b, rest_b, read_b)
            # What is still unread of a run is not smaller than the last that was read of it.
            unread = [rest[0, -1] for run, rest, read in ((a, rest_a, read_a), (b, rest_b, read_b)) if read < len(run)]
            end_a, end_b = (
                np.searchsorted(rest[0], min(unread), "right") if unread else rest.shape[1] for rest in (rest_a, rest_b)
            )
            merged = merge(rest_a[:, :end_a], rest_b[:, :end_b])
            index.append(merged[0, -written % STRIDE :: STRIDE].copy())
            for row, offset in zip(merged, (written, total + written), strict=True):
                file.seek(KEY.itemsize * offset)
                file.write(row)
            written += merged.shape[1]
            rest_a, rest_b = rest_a[:, end_a:], rest_b[:, end_b:]
    return np.concatenate(index)


def filled(run: MemoryRun, rest: np.ndarray, read: int) -> tuple[np.ndarray, int]:
    """``rest`` and as much of the run after ``read`` as makes MERGE_DIGESTS; and where the reading then stands."""
    end = min(len(run), read + MERGE_DIGESTS - rest.shape[1])
    return np.concatenate([rest, run.read(read, end)], axis=1), end
