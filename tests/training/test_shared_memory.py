"""What DeepSpeed's ranks on a CPU share in memory is there for as long as they are, and no longer."""

from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

from megaresid.training.shared_memory import SHARED, own_buffer


def buffers_and_a_sum() -> tuple[bool, list[str], list[str], list[float]]:
    """Runs on every rank: whether DeepSpeed's operator is there; this machine's names of buffers of these ranks, and
    what this process has mapped of them; the sum of the ranks' numbers by it."""
    stem = own_buffer().name.rpartition("_")[0]
    names = [path.name for path in SHARED.glob(f"{stem}_*")]
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if stem in line]
    numbers = torch.full((1000,), float(dist.get_rank() + 1))
    deepspeed.comm.inference_all_reduce(numbers)
    return deepspeed.comm.comm.cdb.shm_comm_op is not None, names, mapped, numbers.unique().tolist()


def test_no_buffer_of_the_ranks_has_a_name_and_all_of_them_work(ranks2):
    for has_operator, names, mapped, total in ranks2.run(buffers_and_a_sum):
        assert names == [] and total == [3.0]
        if not has_operator:
            pytest.skip("DeepSpeed's operator for sums in shared memory is not built here")
        assert len(mapped) == 2 and all(line.endswith("(deleted)") for line in mapped)
