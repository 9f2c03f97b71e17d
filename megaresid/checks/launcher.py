"""The launcher: ranks that it starts add their numbers up in one all-reduce."""

import shutil
import socket
import sysconfig
from collections.abc import Iterator

from megaresid.checks.child import Child, ChildFailed, start
from megaresid.checks.finding import Finding, fault, ok

SECONDS = 180.0


def start_ranks(ranks: int, on_gpu: bool, seconds: float = SECONDS) -> Child:
    """Start the ranks of ``megaresid.checks.ring`` through DeepSpeed's launcher. Raises ChildFailed without it."""
    program = shutil.which("deepspeed", path=sysconfig.get_path("scripts")) or shutil.which("deepspeed")
    if program is None:
        raise ChildFailed("there is no program named deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "--num_accelerators", str(ranks), "--master_port", str(port)]
    command += ["--module", "megaresid.checks.ring"]
    return start(command, seconds, {"OMP_NUM_THREADS": "1", **({} if on_gpu else {"DS_ACCELERATOR": "cpu"})})


def launcher(child: Child, ranks: int) -> Iterator[Finding]:
    try:
        answer = child.answer()
    except ChildFailed as error:
        yield fault(
            "launcher",
            f"{ranks} ranks did not come together ({error})",
            "look for a firewall on this machine's own address, a full /dev/shm, another version of torch or DeepSpeed",
        )
        return
    wanted = ranks * (ranks + 1) / 2
    if answer["sum"] == wanted and answer["ranks"] == ranks:
        yield ok("launcher", f"{ranks} ranks, one all-reduce by {answer['backend']}")
    else:
        words = f"{answer['ranks']} ranks of {ranks} added up to {answer['sum']:g}, where it is {wanted:g}"
        yield fault("launcher", words, f"install another version of {answer['backend']} or of torch")
