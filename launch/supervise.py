"""Starts a launcher, passes signals on to the ranks, and leaves no process behind: python launch/supervise.py ARGUMENTS

The arguments are DeepSpeed's launcher's, or begin with another program (torchrun, python). --restart K among them
starts it again, at most K times, where it ends by a fault. Linux, and nothing but Python's own library.

SIGTERM, SIGINT, SIGHUP   the ranks save and leave: exit code 75. The second one ends all at once: 128 + its number.
SIGUSR1                   the ranks save and go on.
"""

import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megaresid.exit_codes import FAULT, FINISHED, NOT_MENDED_BY_A_RESTART, STOPPED, UNHEALTHY, USERS_MISTAKE
from megaresid.training.supervisor import FOLDER, LOCK, read_reports

PROGRAMS = ("deepspeed", "torchrun", "python")
STOPPING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
AT_ONCE = 0.2
"""Seconds within which a signal that comes twice is one: `timeout` sends it to a process and to its group."""
GRACE = float(os.environ.get("MEGARESID_GRACE_SECONDS", "20"))
"""Seconds that the other ranks have when one has ended; a launcher by itself gives them 30 each."""
FIRST_PAUSE = float(os.environ.get("MEGARESID_RESTART_SECONDS", "5"))
POLL = 0.1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    arguments, restarts = taken_restart(sys.argv[1:])
    # Whatever the launcher leaves behind becomes our child, and is found and ended.
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signals = STOPPING | {signal.SIGUSR1, signal.SIGCHLD}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
        signals.remove(signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    command = arguments if arguments and arguments[0] in PROGRAMS else [PROGRAMS[0], *arguments]
    for pause, left in zip((FIRST_PAUSE * 2**n for n in range(restarts)), reversed(range(restarts))):
        start = Start(command, signals)
        code = start.run()
        if code in NOT_MENDED_BY_A_RESTART or start.stopping:
            return code
        say(f"{start.fault or f'the launcher ended with code {code}'}: starting again in {pause:g} s from the newest "
            f"checkpoint; {left} restarts are left after this one")
        if received := signal.sigtimedwait(signals - {signal.SIGUSR1, signal.SIGCHLD}, pause):
            say(f"{name(received)}: not started again")
            return STOPPED
        command = resumed(command)
    return Start(command, signals).run()


class Start:
    """One start of the launcher, until it and all that it started have ended."""

    def __init__(self, command: list[str], signals: set[signal.Signals]):
        self._signals = signals
        self._folder = Path(tempfile.mkdtemp(prefix="megaresid-"))
        self._lock = open(self._folder / LOCK, "wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.stopping = False
        self.fault: str | None = None  # what is known of the first rank that ended by one
        self._first_stop = self._deadline = float("inf")
        environment = {**os.environ, FOLDER: str(self._folder)}
        try:
            # Its own group: a terminal's Ctrl-C must not reach the launcher, which would end the ranks.
            self._launcher = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=environment, process_group=0, preexec_fn=_be_the_launcher
            )
        except OSError as error:
            sys.exit(f"error: {command[0]}: {error.strerror}")

    def run(self) -> int:
        """The exit code."""
        at_once = None
        while at_once is None and self._launcher.poll() is None and time.monotonic() < self._deadline:
            received = signal.sigtimedwait(self._signals, POLL)
            if received is not None:
                at_once = self._receive(received)
            self._watch()
        self._watch()
        code = self._launcher.poll()
        reports = read_reports(self._folder)
        if at_once is None:
            at_once = agreed_code([report["code"] for report in reports], code)
        end_descendants(self._launcher)
        self._lock.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        return at_once

    def _receive(self, received: signal.struct_siginfo) -> int | None:
        """Pass a signal on to the ranks; the exit code where it ends everything now."""
        number = received.si_signo
        running = [report for report in read_reports(self._folder) if report["code"] is None]
        if number == signal.SIGUSR1:
            # One rank's wish is all ranks': sent to several, it could come to them before and after the end of a step.
            send(running[:1], number)
        elif number in STOPPING:
            now = time.monotonic()
            if self.stopping and now - self._first_stop > AT_ONCE:
                say(f"{name(received)} again: leaving at once")
                return 128 + number
            if not self.stopping:
                self.stopping, self._first_stop = True, now
                if not running:
                    say(f"{name(received)} before any rank had started: nothing to save")
                    return STOPPED
                say(f"{name(received)}: the ranks save after this step and leave; once more to leave at once")
                send(running, signal.SIGTERM)
        return None

    def _watch(self) -> None:
        """See which ranks have ended; those that wait for them are given GRACE seconds."""
        if self._deadline < float("inf"):
            return
        reports = read_reports(self._folder)
        dead = [report for report in reports if report["code"] is None and not lives(report["pid"])]
        failed = [report for report in reports if report["code"] not in (None, *NOT_MENDED_BY_A_RESTART)]
        if dead or failed:
            ranks = dead or failed[:1]
            ended = "died" if dead else "failed"
            self.fault = f"{described(ranks)} on {socket.gethostname()} {ended} {place(ranks[0])}"
            say(f"error: {self.fault}")
        if dead or any(report["code"] is not None for report in reports):
            self._deadline = time.monotonic() + GRACE


def _be_the_launcher() -> None:
    """In the child, before it becomes the launcher: to end with the supervisor, and to receive signals again."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so would all ranks


def agreed_code(codes: list[int | None], launchers: int | None) -> int:
    """What the ranks' codes amount to (None: ended without a word), and the launcher's where they do not say.

    ``launchers`` is None where it had not ended in time: ranks that said that they had finished have, however long
    their processes took to end.
    """
    for decisive in (USERS_MISTAKE, UNHEALTHY):
        if decisive in codes:
            return decisive
    if any(code not in (FINISHED, STOPPED) for code in codes):
        return FAULT
    if STOPPED in codes:
        return STOPPED
    if launchers is None:
        return FINISHED if codes else FAULT
    return launchers if launchers >= 0 else FAULT


def described(reports: list[dict]) -> str:
    ranks = ", ".join(f"{report['rank']} (process {report['pid']})" for report in reports)
    return f"rank{'s' if len(reports) > 1 else ''} {ranks}"


def place(report: dict) -> str:
    return "before its first step" if report["step"] is None else f"at step {report['step']}"


def send(reports: list[dict], number: int) -> None:
    for report in reports:
        try:
            os.kill(report["pid"], number)
        except ProcessLookupError:
            pass


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def descendants() -> list[tuple[int, int]]:
    """(process, parent) of all processes below this one."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [os.getpid()]
    while waiting:
        parent = waiting.pop()
        found += [(child, parent) for child in children.get(parent, [])]
        waiting += children.get(parent, [])
    return found


def end_descendants(launcher: subprocess.Popen) -> None:
    """Kill all processes below this one, and wait until they are gone."""
    deadline = time.monotonic() + GRACE
    while launcher.poll() is None or (left := descendants()):
        for pid, parent in descendants():
            try:
                os.kill(pid, signal.SIGKILL)
                if parent == os.getpid() and pid != launcher.pid:
                    os.waitpid(pid, os.WNOHANG)
            except (ProcessLookupError, ChildProcessError):
                pass
        if time.monotonic() > deadline:
            say(f"error: the system has not ended processes {', '.join(str(pid) for pid, _ in left)}")
            return
        time.sleep(0.01)


def taken_restart(arguments: list[str]) -> tuple[list[str], int]:
    """The arguments without --restart, and its value."""
    rest, count = [], "0"
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--restart" or argument.startswith("--restart="):
            count = argument.partition("=")[2] or next(waiting, "")
        else:
            rest.append(argument)
    if not count.isdecimal():
        print(f"error: --restart {count}: give how many times, a whole number", file=sys.stderr)
        sys.exit(USERS_MISTAKE)
    return rest, int(count)


def resumed(command: list[str]) -> list[str]:
    """The same command, going on from the run's own newest checkpoint; until there is one, from what it names."""
    run = option(command, "run-dir", "run_dir")
    named = option(command, "resume", "resume")
    if named not in (None, "auto") and not (run and list(Path(run).glob("checkpoints/step_*/complete.json"))):
        return command
    return [*without(command, "resume"), "--resume", "auto"]


def option(command: list[str], name: str, key: str) -> str | None:
    """The value of an option: the last one given, else the one in the file of --config."""
    for position in reversed(range(len(command))):
        given, equals, value = command[position].partition("=")
        if given in (f"--{name}", f"--{name.replace('-', '_')}"):
            return value if equals else next(iter(command[position + 1 :]), None)
    if name != "config" and (path := option(command, "config", "config")):
        try:
            return json.loads(Path(path).read_bytes()).get(key)
        except (OSError, ValueError, AttributeError):
            pass
    return None


def without(command: list[str], name: str) -> list[str]:
    kept, waiting = [], iter(command)
    for argument in waiting:
        if argument == f"--{name}":
            next(waiting, None)
        elif not argument.startswith(f"--{name}="):
            kept.append(argument)
    return kept


def name(received: signal.struct_siginfo) -> str:
    return signal.Signals(received.si_signo).name


def say(line: str) -> None:
    # In one write: where Python does not buffer, print makes two, and a rank's line could come between.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
