"""The GPUs: what torch sees of them, what the driver says, and the kernels of linear attention.

What torch and the kernels find is found in processes of their own (``gpu_probe``, ``kernel_probe``): a driver that does
not fit, or a kernel that is compiled wrong, may end a process.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

from megaresid.checks.child import ChildFailed, start_module
from megaresid.checks.finding import Finding, fault, ok, warning

PROBE_SECONDS, KERNEL_SECONDS, SMI_SECONDS = 60.0, 400.0, 20.0
LEAST_FREE = 0.9  # of a GPU's memory


class Driver(NamedTuple):
    """What nvidia-smi says: its version, the GPUs' names, and the processes that use them with their memory in MiB."""

    version: str
    names: list[str]
    processes: dict[int, int]


def ask_driver() -> Driver | None:
    """None where there is no nvidia-smi, it finds no GPU, or CUDA_VISIBLE_DEVICES hides all."""
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    gpus = _smi("--query-gpu=driver_version,name")
    if not gpus:
        return None
    processes = {}
    for row in _smi("--query-compute-apps=pid,used_memory"):
        if row[0].isdigit():
            processes[int(row[0])] = int(row[1]) if row[1].isdigit() else 0
    return Driver(gpus[0][0], [row[1] for row in gpus], processes)


def _smi(query: str) -> list[list[str]]:
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=SMI_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == 2] if done.returncode == 0 else []


def ask_torch() -> dict[str, Any]:
    """What torch sees, of ``gpu_probe``; where it fails ``{"error": its words}``."""
    try:
        return start_module("megaresid.checks.gpu_probe", seconds=PROBE_SECONDS).answer()
    except ChildFailed as error:
        return {"error": str(error)}


def gpus(seen: dict[str, Any], driver: Driver | None) -> Iterator[Finding]:
    """``seen`` is the answer of ``ask_torch``."""
    if "error" in seen:
        yield fault("torch", f"it cannot be imported or asked ({seen['error']})", "install it anew")
        return
    if not seen["devices"]:
        if driver is None:
            yield ok("GPU", "none: runs go on the CPU")
        elif seen["cuda"] is None:
            words = f"{driver.names[0]} is there, and torch {seen['torch']} is built without CUDA"
            yield fault("GPU", words, "install torch for CUDA, as pytorch.org says")
        else:
            words = f"{driver.names[0]} is there, and torch for CUDA {seen['cuda']} cannot use it"
            because = f"driver {driver.version}{seen['why'] and ', ' + seen['why']}"
            yield fault("GPU", f"{words} ({because})", "install torch for the CUDA of the driver, or a newer driver")
        return
    for number, device in enumerate(seen["devices"]):
        name = f"GPU {number}"
        if device["architecture"] not in seen["architectures"]:
            built_for = " ".join(seen["architectures"])
            words = f"{device['name']} is {device['architecture']}, torch is built for {built_for}"
            yield fault(name, words, "install a torch that is built for it")
            continue
        total, free = device["total"] / 2**30, device["free"] / 2**30
        words = f"{device['name']}, {free:.1f} of {total:.1f} GiB free"
        if free >= LEAST_FREE * total:
            yield ok(name, f"{words}, torch {seen['torch']} for CUDA {seen['cuda']}")
        else:
            who = ", ".join(f"process {pid} with {mib} MiB" for pid, mib in driver.processes.items()) if driver else ""
            yield warning(name, words, f"other processes use it ({who or 'none of this machine is seen'}): end them")


def kernels() -> Iterator[Finding]:
    """The self-check of every kernel that a mixer of gpt2-medium would run in, each against the plain form."""
    try:
        answer = start_module("megaresid.checks.kernel_probe", seconds=KERNEL_SECONDS).answer()
    except ChildFailed as error:
        yield fault("kernels", f"their self-check did not end ({error})", "install another triton, or choose softmax")
        return
    for name, words in answer["right"].items():
        yield ok(f"kernel of {name}", words)
    for name, words in answer["wrong"].items():
        yield fault(f"kernel of {name}", words, "")
