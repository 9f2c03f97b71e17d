"""The processes that make parts. A worker reads its units itself: only their descriptions and records are passed on."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from ctypes import c_bool, c_int64

from data_prep.parts import PartRecord
from data_prep.sources.source import Unit
from data_prep.worker import Worker, WorkerOptions

# Of each worker on the board: the serial number of its unit (0: none), and the bytes, documents and tokens done of it.
FIELDS = 4
SECONDS_TO_END = 2.0


class Stopped(Exception):
    """What a worker raises when it was told to leave its unit."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM to the end of the body. Raised inside the executor or a future, they can leave a lock
    taken for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {s: signal.signal(s, lambda number, _: came.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


class Pool:
    """``workers`` processes, started at once and ended by ``close``; a context manager."""

    def __init__(self, workers: int, options: WorkerOptions):
        self.workers = workers
        # Not forked: the parent has threads.
        context = multiprocessing.get_context("spawn")
        self._board = context.RawArray(c_int64, FIELDS * workers)
        self._stop = context.RawValue(c_bool, False)
        free = context.SimpleQueue()
        for slot in range(workers):
            free.put(slot)
        self._executor = ProcessPoolExecutor(workers, context, _start, (options, self._board, self._stop, free))
        for _ in range(workers):
            self._submit(_get_ready)

    def make_part(self, serial: int, unit: Unit) -> Future[PartRecord]:
        """Have a unit made into a part by whichever worker is free; ``serial`` > 0 is its number on the board."""
        return self._submit(_make_part, serial, unit)

    def at_work(self) -> dict[int, tuple[int, int, int]]:
        """The serial numbers of the units that workers took last, with the bytes, documents and tokens done of each."""
        board = list(self._board)
        rows = (board[start : start + FIELDS] for start in range(0, len(board), FIELDS))
        return {serial: tuple(counts) for serial, *counts in rows if serial}

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Have the workers leave what they are at, and wait until they have ended."""
        self._stop.value = True
        with uninterrupted():
            self._executor.shutdown(cancel_futures=True)

    def _submit(self, *call) -> Future:
        # A submission may start a process, which takes this mask over: Ctrl-C must not end it before it ignores that.
        with uninterrupted():
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return self._executor.submit(*call)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start(options: WorkerOptions, board, stop, free) -> None:
    global _options, _worker, _board, _stop, _slot
    # Signals to the whole group are the parent's to answer, and a parent that was killed must not leave workers behind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _options, _worker, _board, _stop, _slot = options, None, board, stop, FIELDS * free.get()


def _end_soon(*_) -> None:
    """A parent that was terminated too has the workers end within this time, and must not take them for killed."""
    timer = threading.Timer(SECONDS_TO_END, os._exit, (128 + signal.SIGTERM,))
    timer.daemon = True
    timer.start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _get_ready() -> None:
    """Load what encoding needs. Not when the process starts: a mistake there would pass for a killed worker."""
    global _worker
    if _worker is None:
        _worker = Worker(_options)


def _make_part(serial: int, unit: Unit) -> PartRecord:
    def report(position: int, documents: int, tokens: int) -> None:
        if _stop.value:
            raise Stopped
        _board[_slot + 1 : _slot + FIELDS] = position, documents, tokens

    _get_ready()
    _board[_slot : _slot + FIELDS] = serial, 0, 0, 0
    return _worker.make_part(unit, report)
