"""The machine: cores, memory that processes share, open files."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from megaresid.checks.finding import Finding, fault, ok, warning

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = 256 * 2**20  # a container's usual 64 MiB are too few for the collectives of several ranks
LEAST_FILES = 1024  # 128 shards, safetensors files of a checkpoint, libraries and sockets


def cores_available(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """This process's share of the processors: its affinity, and a container's quota, which that does not show."""
    cores = float(len(os.sched_getaffinity(0)))
    try:
        share, period = quota.read_text().split()
        return cores if share == "max" else min(cores, int(share) / int(period))
    except (OSError, ValueError):
        return cores


def cores(ranks: int, available: float) -> Iterator[Finding]:
    """Whether as many ranks as there are GPUs, or two on a CPU, have their threads' cores to themselves."""
    set_to = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(set_to) if set_to.isdigit() else 1
    words = f"{available:g} for {ranks} ranks of {threads} threads"
    if ranks * threads <= available:
        yield ok("cores", words)
    else:
        mend = f"set OMP_NUM_THREADS={max(1, int(available / ranks))}"
        mend += "" if ranks <= available else " and use fewer ranks"
        yield warning("cores", f"{words}, which wait for each other", mend)


def shared_memory(folder: Path = SHARED_MEMORY) -> Iterator[Finding]:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield fault("shared memory", f"{folder} cannot be written", "mount a tmpfs there (docker: --ipc=host)")
        return
    free = shutil.disk_usage(folder).free
    words = f"{free / 2**20:,.0f} MiB free in {folder}"
    if free < LEAST_SHARED:
        yield warning("shared memory", words, "give it more (docker: --shm-size=1g or --ipc=host), or empty it")
    else:
        yield ok("shared memory", words)


def open_files(limit: int | None = None) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if limit != resource.RLIM_INFINITY and limit < LEAST_FILES:
        yield warning("open files", f"at most {limit}", f"ulimit -n {LEAST_FILES} or more, before the start")
    else:
        yield ok("open files", "no limit" if limit == resource.RLIM_INFINITY else f"at most {limit}")
