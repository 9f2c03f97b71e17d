"""The runs of a sweep, so many at a time: started, followed, held against each other, and stopped by signals."""

import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megaresid import exit_codes
from megaresid.errors import UserError
from megaresid.sweeping import process
from megaresid.sweeping.folder import Folder, Run, metrics_of
from megaresid.sweeping.progress import Progress, State, duration
from megaresid.sweeping.sharing import Sharing, read_initial

POLL_SECONDS = 0.2
LOOK_SECONDS = 1.0
"""Between two looks at the metrics of the runs."""
WORDS = {
    exit_codes.USERS_MISTAKE: "a mistake in what was given",
    exit_codes.UNHEALTHY: "stopped by the health guard (diverged)",
}


class Signals:
    """Those that have come to stop the sweep."""

    def __init__(self):
        self.received: list[int] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
            numbers.remove(signal.SIGHUP)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        self.received.append(number)


@dataclass
class Job:
    """What is to be started: a run, or a measurement of one."""

    name: str
    run: Run
    place: Path
    config: Path
    log: Path
    state: State
    slot: dict[str, str] | None = None
    popen: subprocess.Popen | None = None
    stopped_by_us: bool = False


class Runner:
    """Carries out jobs. ``failures`` has a line for each that failed, by name; ``stopped`` is the exit code with which
    the sweep was stopped, None where it was not."""

    def __init__(
        self, folder: Folder, ranks: int, slots: Sequence[dict[str, str]], progress: Progress, sharing: Sharing | None
    ):
        self._folder, self._ranks, self._progress, self._sharing = folder, ranks, progress, sharing
        self._free = list(slots)
        self._running: list[Job] = []
        self.failures: dict[str, str] = {}
        self.codes: dict[str, int] = {}
        self.stopped: int | None = None

    def carry_out(self, jobs: Sequence[Job], signals: Signals) -> None:
        """Until all have ended, or the sweep is stopped; no process is left in either case."""
        waiting, passed_on, looked = deque(jobs), 0, 0.0
        try:
            while self._running or (waiting and self.stopped is None):
                while waiting and self._free and self.stopped is None and not signals.received:
                    self._start(waiting.popleft())
                for number in signals.received[passed_on:]:
                    self._stop_all(number, again=self.stopped is not None)
                passed_on = len(signals.received)
                for job in [job for job in self._running if job.popen.poll() is not None]:
                    self._look_at(job)
                    self._end(job)
                if time.monotonic() - looked >= LOOK_SECONDS:
                    for job in self._running:
                        self._look_at(job)
                    self._progress.refresh()
                    looked = time.monotonic()
                if self._running:
                    time.sleep(POLL_SECONDS)
        finally:
            for job in self._running:  # an error of the sweep's own
                job.popen.terminate()
            for job in self._running:
                job.popen.wait()

    def _start(self, job: Job) -> None:
        if problem := self._start_differs(job):
            self._fail(job, exit_codes.FAULT, problem)
            return
        job.slot = self._free.pop()
        job.popen = process.start(job.config, job.log, self._ranks, job.slot)
        job.state.status, job.state.told = "running", time.monotonic()
        self._running.append(job)
        self._progress.say(f"started   {job.name}, output in {job.log}")

    def _look_at(self, job: Job) -> None:
        job.state.take(metrics_of(job.place))
        if not job.stopped_by_us and (problem := self._start_differs(job)):
            job.stopped_by_us = True
            self.failures[job.name] = problem
            self._progress.say(f"error: {problem}; it is stopped")
            job.popen.send_signal(signal.SIGTERM)

    def _start_differs(self, job: Job) -> str | None:
        """What is wrong with what the run started from; None where nothing is, or it has not said so yet."""
        if self._sharing is None or self._sharing.has_seen(job.name):
            return None
        try:
            if (initial := read_initial(job.place)) is not None:
                self._sharing.add(job.name, job.run.variant, job.run.seed, initial)
        except UserError as error:
            return str(error)
        return None

    def _stop_all(self, number: int, again: bool) -> None:
        if not again:
            self.stopped = exit_codes.STOPPED
            name = signal.Signals(number).name
            self._progress.say(f"{name}: the runs save and leave; once more to leave at once")
        else:
            self.stopped = 128 + number
        for job in self._running:
            job.popen.send_signal(signal.SIGTERM)

    def _end(self, job: Job) -> None:
        self._running.remove(job)
        self._free.append(job.slot)
        job.slot = None
        code = job.popen.returncode
        code = 128 - code if code < 0 else code
        self.codes[job.name] = code
        state = job.state
        if job.stopped_by_us:
            state.status = "failed"
            self._folder.record_outcome(job.name, code, self.failures[job.name])
        elif code == exit_codes.FINISHED and state.step == state.steps:
            state.status = "finished"
            self._folder.record_outcome(job.name, code, "finished")
            seconds = duration(self._training_seconds(job))
            loss = "" if state.validation_loss is None else f", val_loss {state.validation_loss:.4f}"
            self._progress.say(f"finished  {job.name}: {state.step:,} steps in {seconds}{loss}")
        elif code == exit_codes.FINISHED:
            line = f"it ended, but its metrics have no step {state.steps}: was the disk full?"
            self._fail(job, exit_codes.FAULT, line)
        elif code == exit_codes.STOPPED or self.stopped is not None:
            state.status = "waiting"
            self._folder.record_outcome(job.name, code, "stopped")
            self._progress.say(f"stopped   {job.name} at step {state.step:,}")
            if self.stopped is None:
                self.stopped = exit_codes.STOPPED
                self._progress.say(f"{job.name} was sent a signal, which stops the sweep: the others save and leave")
                for other in self._running:
                    other.popen.send_signal(signal.SIGTERM)
        else:
            self._fail(job, code, self._why(job, code))

    def _training_seconds(self, job: Job) -> float | None:
        rows = [row for row in metrics_of(job.place) if row.get("training_seconds")]
        return rows[-1]["training_seconds"] if rows else None

    def _fail(self, job: Job, code: int, line: str) -> None:
        job.state.status = "failed"
        self.codes.setdefault(job.name, code)
        self.failures[job.name] = line
        if job.popen is not None:
            self._folder.record_outcome(job.name, code, line)
        self._progress.say(f"failed    {job.name}: {line}")

    def _why(self, job: Job, code: int) -> str:
        """The exit code in words, and the last line of the output that tells an error."""
        words = f"exit code {code}"
        if code in WORDS:
            words += f", {WORDS[code]}"
        told = f"{words} at step {job.state.step:,}, see {job.log}"
        try:
            with open(job.log, "rb") as log:
                log.seek(max(0, log.seek(0, 2) - 65536))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return told
        errors = [line for line in lines if line.startswith("error: ")]
        return f"{told}: {errors[-1].removeprefix('error: ')}" if errors else told


def waiting_state(folder: Folder, run: Run) -> State:
    """How a run stands before the sweep goes on."""
    status = "finished" if folder.is_finished(run) else "failed" if folder.has_diverged(run) else "waiting"
    state = State(run.name, status, run.steps)
    state.take(metrics_of(folder.run(run.name)))
    return state


def job_of(folder: Folder, run: Run, state: State) -> Job:
    """A run that is to be started, or to go on from its newest checkpoint."""
    place = folder.run(run.name)
    values = run.config | {"run_dir": str(place), "resume": "auto"}
    return Job(run.name, run, place, folder.write_config(run.name, values), folder.log(run.name), state)
