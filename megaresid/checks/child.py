"""Parts of a check that may crash, hang or load much, each in a process of its own with a time limit."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MARK = "megaresid-check "


class ChildFailed(Exception):
    """The process crashed, was too slow or gave no answer; the message is one line."""


@dataclass
class Child:
    """A process that was started, with what it prints in a file, and the seconds that it may take."""

    process: subprocess.Popen
    output: Any
    seconds: float

    def answer(self) -> dict[str, Any]:
        """What it gave to ``give``. Raises ChildFailed; the process and those that it started have ended then."""
        try:
            code = self.process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            raise ChildFailed(f"no answer within {self.seconds:g} s") from None
        finally:
            self.end()
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").splitlines()
        answers = [line.partition(MARK)[2] for line in lines if MARK in line]
        if answers and code == 0:
            return json.loads(answers[-1])
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise ChildFailed(f"{ended}, {said}")

    def end(self) -> None:
        """Kill it and those that it started, unless they have ended."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def start(command: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> Child:
    """Start a process in a group of its own. Raises ChildFailed where the program is not there."""
    output = tempfile.TemporaryFile()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | (environment or {}),
        )
    except OSError as error:
        raise ChildFailed(f"{command[0]} cannot be started ({error.strerror})") from None
    return Child(process, output, seconds)


def start_module(module: str, *arguments: str, seconds: float) -> Child:
    """``python -m module`` of this Python."""
    return start([sys.executable, "-m", module, *arguments], seconds)


def give(answer: dict[str, Any]) -> None:
    """Called in the process: its answer, apart from what libraries print."""
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)
