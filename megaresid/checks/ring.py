"""One rank of the launcher's check; started by ``megaresid.checks.launcher``, in a process of its own."""

import os
from datetime import timedelta

from megaresid.checks.child import give

SECONDS = 60


def main() -> None:
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=SECONDS))
    mine = torch.full((1,), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(mine)
    if dist.get_rank() == 0:
        give({"sum": mine.item(), "ranks": dist.get_world_size(), "backend": backend})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
