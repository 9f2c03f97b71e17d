"""Hold a configuration to its promise: N + M steps equal N steps, kill -9, resume, M steps.

    python -m megaresid.verify_resume --config run.json [options of megaresid.train] --first N --second M [--ranks R]

Three runs of real processes under DeepSpeed's launcher, in a temporary folder, which stays there where they differ.
Exit code 0: equal; 1: not; 2: a mistake in the options.
"""

import argparse
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaresid.config import RunConfig, parse
from megaresid.errors import UserError, exits_with_user_errors
from megaresid.training.run_dir import LOCK, write_json

if TYPE_CHECKING:
    from megaresid.run_comparison import Row

OURS = ("--run-dir", "--resume", "--steps", "--checkpoint-interval", "--log-interval", "--dry-run", "--allow-other")
"""Options that are set here, each run's own."""

POLL_SECONDS = 0.2
LOCK_SECONDS = 60.0


class RunFailed(Exception):
    """A run ended as it should not; the end of its output."""


@exits_with_user_errors
def main(arguments: list[str] | None = None) -> None:
    chosen, config = _options(sys.argv[1:] if arguments is None else arguments)
    folder = Path(tempfile.mkdtemp(prefix="megaresid-verify-"))
    keep = True
    try:
        rows = verify(config, chosen.first, chosen.second, chosen.ranks or _ranks(), folder)
        keep = any(row.fault for row in rows)
        if keep:
            print(f"verify_resume: the resumed run is another: {folder}", flush=True)
        else:
            bitwise = all(row.difference is None for row in rows)
            print(f"verify_resume: {'equal, bit for bit' if bitwise else 'equal but for rounding'}", flush=True)
    except UserError:
        keep = False
        raise
    except RunFailed as error:
        print(f"{error}\nverify_resume: a run failed: {folder}", file=sys.stderr, flush=True)
    finally:
        if not keep:
            shutil.rmtree(folder)
    sys.exit(int(keep))


def _options(arguments: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    parser = argparse.ArgumentParser(
        prog="python -m megaresid.verify_resume",
        description=__doc__,
        epilog="All other options are those of python -m megaresid.train.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--first", type=int, required=True, metavar="N", help="steps before the kill")
    parser.add_argument("--second", type=int, required=True, metavar="M", help="steps after it")
    parser.add_argument("--ranks", type=int, metavar="R", help="by default one a GPU, or 2 on a CPU")
    chosen, rest = parser.parse_known_args(arguments)
    for name in ("first", "second", "ranks"):
        if (value := getattr(chosen, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    for argument in rest:
        if (name := argument.split("=")[0].replace("_", "-")) in OURS:
            raise UserError(f"{name}: it is set for each of the runs: leave it out")
    return chosen, parse([*rest, "--run-dir", "not used"])


def _ranks() -> int:
    import torch

    return torch.cuda.device_count() or 2


def verify(config: RunConfig, first: int, second: int, ranks: int, folder: Path) -> "list[Row]":
    """Run all three in ``folder`` and print the table, whose rows it returns. Raises UserError where a run says that of
    the options, RunFailed where one fails otherwise."""
    steps = first + second
    common = {"steps": steps, "log_interval": 1, "allow_other": "", "dry_run": False}
    at_the_end = {"checkpoint_interval": steps, "keep_checkpoints": 0}
    whole, resumed = folder / "whole", folder / "resumed"
    checkpoint = f"step_{first:08d}"

    def start(number: int, name: str, run: Path, until: int, what: str, changes: dict[str, Any], killed=None) -> None:
        values = config.flat() | common | {"run_dir": str(run), "resume": None} | changes
        process = _Process(folder, name, values, ranks, {} if killed is None else {"MEGARESID_HOLD_AFTER": str(first)})
        process.follow(f"run {number} of 3, {what}", run, until, killed)

    start(1, "whole", whole, steps, f"{steps} steps", at_the_end)
    saved = resumed / "checkpoints" / checkpoint / "complete.json"
    only_then = {"checkpoint_interval": first, "keep_checkpoints": 0}
    start(2, "killed", resumed, first, f"{first} steps and kill -9", only_then, killed=saved.exists)
    _wait_for_lock(resumed)
    environments = [_environment(whole), _environment(resumed)]
    going_on = at_the_end | {"resume": "auto", "init_from": None}
    start(3, "resumed", resumed, steps, f"resume, {second} steps", going_on)
    environments.append(_environment(resumed))

    from megaresid.run_comparison import (
        ON_A_GPU,
        Row,
        compare_checkpoints,
        compare_numbers,
        compare_traces,
        environments_differ,
    )

    others = sorted({told for other in environments[1:] for told in environments_differ(environments[0], other)})
    on_cpu = not environments[0]["devices"]
    traces = [folder / name / "trace" for name in ("of-whole", "of-killed", "of-resumed")]
    end = Path("checkpoints") / f"step_{steps:08d}"
    rows = compare_numbers(whole, resumed, 0.0 if on_cpu else ON_A_GPU)
    rows += compare_traces(traces[0], traces[1:])
    rows += compare_checkpoints(whole / end, resumed / end, exact=on_cpu)
    rows.append(Row("environment", "3 starts", "; ".join(others) or None, False))
    _print_table(rows, environments[0], on_cpu)
    return rows


class _Process:
    """One run under the launcher, in a session of its own, so that all of it can be killed."""

    def __init__(self, folder: Path, name: str, values: dict[str, Any], ranks: int, environment: dict[str, str]):
        place = folder / f"of-{name}"
        trace = place / "trace"
        trace.mkdir(parents=True)
        write_json(place / "config.json", values)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
        command += ["--master_port", str(port), "--module", "megaresid.train", "--config", str(place / "config.json")]
        self._output = place / "output.txt"
        with open(self._output, "wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "MEGARESID_TRACE": str(trace), **environment},
                start_new_session=True,
            )

    def follow(self, what: str, run: Path, steps: int, killed: Callable[[], bool] | None) -> None:
        """Tell how far it is until it ends, or until it is to be killed."""
        progress = _Progress(what, steps)
        try:
            while self._process.poll() is None:
                if killed is not None and killed():
                    break
                progress.tell(run / "metrics.jsonl")
                try:
                    self._process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    pass
            code = self._process.poll()
        finally:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
            progress.end()
        if code is None or (code == 0 and killed is None):
            return
        said = self._output.read_text(encoding="utf-8", errors="replace")
        mistakes = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
        if code == 2 and mistakes:
            raise UserError(mistakes[0])
        raise RunFailed(f"{said[-3000:]}\n{what}: it ended with code {code}")


class _Progress:
    """A line that is written over on a terminal, and one line a run elsewhere."""

    def __init__(self, what: str, steps: int):
        self._what, self._steps, self._began = what, steps, time.monotonic()
        self._terminal = sys.stderr.isatty()
        if not self._terminal:
            print(f"verify_resume: {what}", file=sys.stderr, flush=True)

    def tell(self, metrics: Path) -> None:
        if self._terminal:
            seconds = time.monotonic() - self._began
            done = _last_step(metrics)
            line = f"verify_resume: {self._what}: step {done} of {self._steps}, {seconds:.0f} s"
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _last_step(metrics: Path) -> int:
    from megaresid.training.run_dir import read_metrics

    rows = read_metrics(metrics.parent) if metrics.exists() else []
    return rows[-1]["step"] if rows else 0


def _wait_for_lock(run: Path) -> None:
    """Until the killed processes are gone: the system may take a while to give back their memory."""
    end = time.monotonic() + LOCK_SECONDS
    with open(run / LOCK, "ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RunFailed(f"{run}: a rank outlived kill -9 by {LOCK_SECONDS:.0f} s") from None
                time.sleep(POLL_SECONDS)


def _environment(run: Path) -> dict[str, Any]:
    from megaresid.training.run_dir import read_json

    return read_json(run, "environment.json")


def _print_table(rows: "list[Row]", environment: dict[str, Any], on_cpu: bool) -> None:
    devices = ", ".join(environment["devices"]) or environment["processor"]
    print(
        f"{environment['ranks']} ranks of {environment['threads_per_rank']} threads, torch "
        f"{environment['versions']['torch']}, deepspeed {environment['versions']['deepspeed']}, {devices}"
    )
    if not on_cpu:
        print("on a GPU sums are in no fixed order: losses and norms are held to rounding, parameters are not")
    for row in rows:
        result = "equal" if row.difference is None and not row.fault else row.difference or "nothing to compare"
        print(f"{row.what:<16} {row.compared:<36} {'DIFFERS: ' * row.fault}{result}")


if __name__ == "__main__":
    main()
