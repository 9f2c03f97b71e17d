"""Which unit is made when: parts come out in order, while later ones are made ahead."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool

from data_prep.parts import PartRecord
from data_prep.pool import Pool, uninterrupted
from data_prep.progress import Report
from data_prep.sources.source import Unit
from data_prep.worker import Worker
from megaresid.errors import UserError

# Units handed out for each worker: one that it is at, and one so that it need not wait.
AHEAD = 2
SECONDS_BETWEEN_REPORTS = 0.5


class Schedule:
    """The records of the parts of ``units``, in order; parts in ``found`` are there already, the others are made.

    ``makers`` makes them in this process or in others. Where there is a limit in tokens, no unit is begun while
    ``assembled_tokens``, which the caller raises, and the parts that wait for it may be enough. The reports go by the
    source's bytes, ``total_bytes``, or by the limit, whichever ends first.
    """

    def __init__(
        self,
        units: Iterator[Unit],
        found: dict[str, PartRecord],
        makers: Worker | Pool,
        total_bytes: float,
        limit_tokens: int | None,
        report: Report,
    ):
        self.assembled_tokens = 0
        self._units, self._found, self._makers = units, found, makers
        self._total_bytes, self._limit_tokens, self._report = total_bytes, limit_tokens, report
        # Bytes, documents and tokens of all complete parts.
        self._complete = [0, 0, 0]
        for record in found.values():
            self._count(record)
        self._show()

    def records(self) -> Iterator[PartRecord]:
        """Raises UserError as the workers do, when the unit at fault comes up, and when a worker was killed. Processes
        are closed at the end, or when the caller wants no more."""
        return self._from_pool() if isinstance(self._makers, Pool) else self._from_worker()

    def _from_worker(self) -> Iterator[PartRecord]:
        for unit in self._units:
            record = self._found_for(unit)
            if record is None:
                record = self._makers.make_part(unit, lambda *counts: self._show([counts]))
                self._count(record)
            yield record

    def _from_pool(self) -> Iterator[PartRecord]:
        ahead = _Ahead(self._makers)
        try:
            while True:
                while ahead.has_room and not (ahead.waiting and self._may_be_enough(ahead.tokens)):
                    if (unit := next(self._units, None)) is None:
                        break
                    ahead.put(unit, self._found_for(unit))
                if not ahead.waiting:
                    return
                for record in ahead.wait(0 if ahead.ready() else SECONDS_BETWEEN_REPORTS):
                    self._count(record)
                self._show(ahead.at_work())
                if ahead.ready():
                    yield ahead.get()
        except BrokenProcessPool:
            raise UserError(
                f"a worker process was killed (out of memory?), at work were {ahead.files_at_work()}; go on with "
                "--resume, and fewer --workers"
            ) from None
        finally:
            self._makers.close()

    def _found_for(self, unit: Unit) -> PartRecord | None:
        """The part that is there. A file that could not be cut, and now can, has other units of the same name."""
        record = self._found.get(unit.name)
        return record if record and (record.position, record.bytes) == (unit.position, unit.bytes) else None

    def _may_be_enough(self, waiting_tokens: int) -> bool:
        return self._limit_tokens is not None and self.assembled_tokens + waiting_tokens > self._limit_tokens

    def _count(self, record: PartRecord) -> None:
        for place, count in enumerate((record.bytes, record.documents, record.tokens)):
            self._complete[place] += count

    def _show(self, under_way: Iterable[tuple[int, int, int]] = ()) -> None:
        """``under_way``: bytes, documents and tokens of the units that are worked at."""
        done, documents, tokens = map(sum, zip(self._complete, *under_way, strict=True))
        fraction = done / self._total_bytes if self._total_bytes else 1.0
        if self._limit_tokens is not None:
            fraction = max(fraction, tokens / self._limit_tokens)
        self._report(min(fraction, 1.0), documents, tokens)


class _Ahead:
    """The parts that were begun before they are wanted, in order: ``waiting`` are their futures."""

    def __init__(self, pool: Pool):
        self.pool, self.waiting = pool, deque()
        self.tokens = 0  # of the complete ones
        self._under_way: dict[Future[PartRecord], tuple[int, Unit]] = {}
        self._serial = 0
        self._failed = False

    @property
    def has_room(self) -> bool:
        return len(self._under_way) < AHEAD * self.pool.workers and not self._failed

    def put(self, unit: Unit, record: PartRecord | None) -> None:
        with uninterrupted():
            if record is None:
                self._serial += 1
                future = self.pool.make_part(self._serial, unit)
                self._under_way[future] = self._serial, unit
            else:
                future = Future()
                future.set_result(record)
                self.tokens += record.tokens
            self.waiting.append(future)

    def ready(self) -> bool:
        """Whether the first part is complete, or failed."""
        with uninterrupted():
            return self.waiting[0].done()

    def get(self) -> PartRecord:
        with uninterrupted():
            record = self.waiting.popleft().result()
        self.tokens -= record.tokens
        return record

    def wait(self, seconds: float) -> list[PartRecord]:
        """The parts that were completed; where none was, in this time."""
        complete = []
        with uninterrupted():
            finished, _ = wait(self._under_way, seconds, FIRST_COMPLETED)
            for future in finished:
                if isinstance(error := future.exception(), BrokenProcessPool):
                    raise error
                del self._under_way[future]
                if error is None:
                    complete.append(future.result())
                # An error is raised in its turn, as a limit may end the data set before it; nothing more is begun.
                self._failed |= error is not None
        self.tokens += sum(record.tokens for record in complete)
        return complete

    def at_work(self) -> list[tuple[int, int, int]]:
        """Bytes, documents and tokens done of the units under way."""
        serials = {serial for serial, _ in self._under_way.values()}
        return [counts for serial, counts in self.pool.at_work().items() if serial in serials]

    def files_at_work(self) -> str:
        """The files of the units that workers are at; where they are between two, of those handed out."""
        serials = self.pool.at_work().keys()
        units = [unit for serial, unit in self._under_way.values() if serial in serials]
        units = units or [unit for _, unit in self._under_way.values()]
        return ", ".join(dict.fromkeys(unit.segments[0].name for unit in units)) or "none of its units"
