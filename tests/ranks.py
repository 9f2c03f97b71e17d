"""Persistent rank processes for tests: a start costs 12 to 17 s of imports, so ranks start once and run many checks."""

import ctypes
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

START_SECONDS = 180.0
GRACE_SECONDS = 20.0
"""How long the other ranks may take once one has failed: they may be waiting for it in a collective."""


class RankTimeout(Exception):
    """A function did not return on every rank in time; the ranks were killed."""


class RankDied(Exception):
    """A rank's process ended by itself."""


class RankTraceback(Exception):
    """The cause of an exception raised again in the test: where it came from on the rank."""


class RankPool:
    """``ranks`` processes in one gloo group on this machine, one thread each, started by the first ``run``.

    After a hang, a death, or a failure on some ranks only, the processes are killed and the next ``run`` starts anew.
    """

    def __init__(self, ranks: int):
        self.ranks = ranks
        self._processes: list = []
        self._pipes: list = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """``function(*args)`` on every rank at once; the results by rank.

        ``function`` is a test module's own, at its top level; arguments and results are pickled. A rank's exception
        is raised here with its traceback as the cause. ``timeout`` is in seconds, start-up apart.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send(sys.path)
            pipe.send((function, args))
        return self._collect(f"{function.__module__}.{function.__qualname__}", timeout)

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.ranks):
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, rank, self.ranks, port), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)
        self._collect("joining the process group", START_SECONDS)

    def _collect(self, what: str, timeout: float) -> list[Any]:
        answers: dict[int, tuple[Any, BaseException | None]] = {}
        deadline = time.monotonic() + timeout
        while waiting := {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    self._processes[rank].join(5)
                    died = RankDied(f"rank {rank} of {self.ranks} ended with {self._processes[rank].exitcode}: {what}")
                    answers[rank] = None, died
                if answers[rank][1] is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        failures = [answers[rank][1] for rank in sorted(answers) if answers[rank][1] is not None]
        failures.sort(key=lambda failure: not isinstance(failure, RankDied))  # the others failed because of it
        if len(answers) < self.ranks or any(isinstance(failure, RankDied) for failure in failures):
            self.close()
        if failures:
            raise failures[0]
        if len(answers) < self.ranks:
            late = [rank for rank in range(self.ranks) if rank not in answers]
            raise RankTimeout(f"{what}: no answer from ranks {late} of {self.ranks} in {timeout:g} s; they were killed")
        return [answers[rank][0] for rank in range(self.ranks)]


def _serve(pipe, rank: int, ranks: int, port: int) -> None:
    """A rank's process: join the group, then answer calls until the test's end of the pipe closes."""
    _die_with_parent()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        LOCAL_SIZE=str(ranks),  # as the launcher of DeepSpeed says it, whose operators look for it
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    _answer(pipe, _join_group)
    while True:
        try:
            sys.path[:] = pipe.recv()
            function, args = pipe.recv()
        except EOFError:
            return
        except Exception as error:
            pipe.send((None, _portable(error)))
            continue
        _answer(pipe, function, *args)


def _join_group() -> None:
    import torch

    torch.set_num_threads(1)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    from megaresid.training.shared_memory import unlink_own_buffer

    unlink_own_buffer()
    gc.freeze()  # ZeRO-3 collects garbage at every start, which takes half a second with all that was imported


def _answer(pipe, function: Callable[..., Any], *args: Any) -> None:
    try:
        answer = function(*args), None
    except Exception as error:
        answer = None, _portable(error)
    try:
        pipe.send(answer)
    except Exception as error:  # a result that cannot be pickled
        pipe.send((None, _portable(error)))


def _portable(error: Exception) -> "_Remote":
    """The exception with its traceback as text; one that does not survive pickling becomes its text alone."""
    text = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(repr(error))
    return _Remote(error, text)


class _Remote:
    """Pickles to an exception whose cause is the rank's traceback; plain pickling drops causes."""

    def __init__(self, error: Exception, text: str):
        self.error, self.text = error, text

    def __reduce__(self):
        return _with_cause, (self.error, self.text)


def _with_cause(error: Exception, text: str) -> Exception:
    error.__cause__ = RankTraceback("\n" + text)
    return error


def _die_with_parent() -> None:
    """A killed pytest leaves no ranks behind (Linux: PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
