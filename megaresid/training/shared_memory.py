"""The buffers in /dev/shm by which DeepSpeed's ranks on one machine's CPUs add up: 66 MiB a rank, never taken away."""

import os
from pathlib import Path

import torch.distributed

SHARED = Path("/dev/shm")


def own_buffer() -> Path:
    """This rank's, by the name that DeepSpeed gives it."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    rank = torch.distributed.get_rank()
    return SHARED / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"


def unlink_own_buffer() -> None:
    """Take the name of this rank's buffer away, once all ranks have it: it lasts as long as their processes, however
    they end. Left, it would fill the machine's memory run by run. Every rank calls it, after all have joined."""
    torch.distributed.barrier()
    own_buffer().unlink(missing_ok=True)
