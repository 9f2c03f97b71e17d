"""One run of a sweep as a process: the supervisor, which starts the launcher, passes signals on and leaves nothing."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from megaresid.errors import UserError

SUPERVISOR = Path(__file__).parents[2] / "launch" / "supervise.py"
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def slots(jobs: int, ranks: int) -> list[dict[str, str]]:
    """What each of so many jobs at a time has in its environment: GPUs of its own, or its share of the cores as threads
    a rank (or what OMP_NUM_THREADS says). Raises UserError where there are too few GPUs."""
    devices = visible_devices()
    if not devices:
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // (jobs * ranks)))
        return [{"OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cpu"}] * jobs
    if jobs * ranks > len(devices):
        raise UserError(
            f"--jobs {jobs} of --num-accelerators {ranks}: there are {len(devices)} GPUs: give fewer of either"
        )
    groups = (devices[job * ranks : (job + 1) * ranks] for job in range(jobs))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


def visible_devices() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    import torch

    count = torch.cuda.device_count()
    chosen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return chosen[:count] if chosen else [str(number) for number in range(count)]


def start(config: Path, log: Path, ranks: int, environment: dict[str, str]) -> subprocess.Popen:
    """Start a run as its configuration says; its output is added to ``log``.

    In a session of its own, so that a terminal's Ctrl-C reaches it through the sweep alone; where the sweep is killed,
    the run saves and leaves.
    """
    if not SUPERVISOR.is_file():
        raise UserError(f"{SUPERVISOR} is missing: start sweeps from a checkout of megaresid")
    # torchrun rather than DeepSpeed's launcher, which heeds CUDA_VISIBLE_DEVICES for all GPUs of it only.
    launcher = ["python"] if ranks == 1 else ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, str(SUPERVISOR), *launcher, "-m", "megaresid.train", "--config", str(config)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, **environment},
            start_new_session=True,
            preexec_fn=_be_a_run,
        )


def _be_a_run() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGHUP):  # a shell's background jobs ignore the first
        signal.signal(number, signal.SIG_DFL)
