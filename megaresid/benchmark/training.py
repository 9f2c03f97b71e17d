"""Training speed beside nanoGPT: ``python -m megaresid.benchmark.training --peer CHECKOUT --data DIR``

The same shape, vocabulary, batch, data and cores, in fp32 on the CPU. Ours runs under the DeepSpeed launcher with
ZeRO-1, one rank a core; nanoGPT as its own single process on all cores. The two take turns, and every second round
starts with the other one, so that a machine which others use too slows both alike.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

from megaresid.benchmark.nanogpt import import_model
from megaresid.data.manifest import load_manifest
from megaresid.errors import UserError, exits_with_user_errors

SEQUENCES = 8
WARM_UP = 5  # steps that are not counted: the first ones fault in their memory
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Measurement:
    """Of one process: seconds from the command to the end of the first step, and its median speed after the warm-up."""

    start_up: float
    tokens_per_second: float


def read_rows(file: Path) -> list[dict]:
    """The complete rows so far of a JSON-lines file that is being written; none while it does not exist."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in rows if "tokens_per_second" in row]


def measure(command: list[str], rows_file: Path, log: Path, environment: dict[str, str]) -> Measurement:
    """Run a command that writes one row a step; raises UserError with the end of its output when it fails."""
    started, start_up = time.perf_counter(), None
    with open(log, "wb") as output, subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=environment
    ) as process:
        try:
            while process.poll() is None:
                if start_up is None and read_rows(rows_file):
                    start_up = time.perf_counter() - started
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
    speeds = [row["tokens_per_second"] for row in read_rows(rows_file)]
    if process.returncode != 0 or start_up is None or len(speeds) <= WARM_UP:
        tail = " | ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
        raise UserError(f"{log.stem} ended with code {process.returncode} after {len(speeds)} steps: {tail}")
    return Measurement(start_up, median(speeds[WARM_UP:]))


def free_port() -> int:
    """A port that nothing listens on: the launcher's fixed one may be another run's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def ours(folder: Path, data: Path, steps: int, ranks: int, deepspeed_config: Path) -> Measurement:
    """One run of megaresid under the launcher; ranks share the cores out among them."""
    options = {
        "--deepspeed_config": deepspeed_config,
        "--data": data,
        "--model": "tiny",
        "--steps": steps,
        "--run-dir": folder / "run",
        "--global-batch-size": SEQUENCES,
        "--log-interval": 1,
        "--eval": "",
        "--checkpoint-interval": 0,
    }
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    launcher += ["--master_port", str(free_port())]
    command = [*launcher, "--module", "megaresid.train", *(str(word) for pair in options.items() for word in pair)]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment["DS_ACCELERATOR"] = "cpu"  # on a machine with GPUs too
    return measure(command, folder / "run" / "metrics.jsonl", folder / "ours.log", environment)


def nanogpt(folder: Path, data: Path, steps: int, cores: int, peer: Path) -> Measurement:
    """One run of nanoGPT's step on all cores."""
    rows = folder / "nanogpt.jsonl"
    options = ["--peer", peer, "--data", data, "--steps", steps, "--out", rows, "--sequences", SEQUENCES]
    command = [sys.executable, "-m", "megaresid.benchmark.nanogpt", *map(str, options), "--threads", str(cores)]
    return measure(command, rows, folder / "nanogpt.log", os.environ | {"OMP_NUM_THREADS": str(cores)})


def report(our_runs: list[Measurement], peer_runs: list[Measurement]) -> str:
    """Medians over the rounds, and the ratio of the two speeds round by round."""
    ratios = sorted(a.tokens_per_second / b.tokens_per_second for a, b in zip(our_runs, peer_runs, strict=True))
    lines = [
        f"{name:10} {median(run.tokens_per_second for run in runs):8,.0f} tokens/s   "
        f"start-up {median(run.start_up for run in runs):5.1f} s"
        for name, runs in (("megaresid", our_runs), ("nanoGPT", peer_runs))
    ]
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} rounds"
    return "\n".join([*lines, f"megaresid / nanoGPT: {median(ratios):.2f} ({spread})"])


def compare(
    peer: Path,
    data: Path,
    rounds: int = 5,
    steps: int = 25,
    ranks: int | None = None,
    deepspeed_config: Path = Path("ds_configs/cpu.json"),
) -> None:
    """Tokens per second of megaresid and of nanoGPT in the steady state, side by side on this machine's cores.

    Args:
        peer: Checkout of nanoGPT.
        data: Folder of shards with a manifest, made by `python -m data_prep`.
        rounds: How often each of the two is measured.
        steps: Optimizer steps of one measurement; the first five are not counted.
        ranks: Of ours; by default one a core (the largest power of two that divides the batch).
        deepspeed_config: Of ours.
    """
    if rounds < 1 or steps <= WARM_UP:
        raise UserError(f"--rounds {rounds} --steps {steps}: at least 1 round of {WARM_UP + 1} steps")
    if not deepspeed_config.is_file():
        raise UserError(f"--deepspeed-config {deepspeed_config}: no such file; start in the checkout, or name one")
    import_model(peer)
    load_manifest(data)
    cores = len(os.sched_getaffinity(0))
    ranks = ranks or min(SEQUENCES, 1 << (cores.bit_length() - 1))
    print(f"{cores} cores; megaresid: {ranks} ranks of {max(1, cores // ranks)} threads; nanoGPT: {cores} threads")
    runs = {ours: [], nanogpt: []}
    arguments = {ours: (ranks, deepspeed_config.resolve()), nanogpt: (cores, peer.resolve())}
    for index in range(rounds):
        for run in (ours, nanogpt) if index % 2 == 0 else (nanogpt, ours):
            with tempfile.TemporaryDirectory(prefix="megaresid-benchmark-") as folder:
                found = run(Path(folder), data.resolve(), steps, *arguments[run])
            runs[run].append(found)
            print(
                f"round {index + 1}/{rounds}  {run.__name__:8} {found.tokens_per_second:8,.0f} tokens/s   "
                f"start-up {found.start_up:5.1f} s",
                flush=True,
            )
    print(report(runs[ours], runs[nanogpt]))


if __name__ == "__main__":
    exits_with_user_errors(lambda: tyro.cli(compare, prog="python -m megaresid.benchmark.training"))()
