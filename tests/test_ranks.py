"""The pool of ranks: a group that computes together, failures that reach the test, hangs that end."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankDied, RankPool, RankTimeout, RankTraceback

from megaresid.errors import UserError


def sum_over_ranks(value):
    mine = torch.tensor([value * 10.0 ** dist.get_rank()])
    dist.all_reduce(mine)
    return mine.item(), os.environ["RANK"], torch.get_num_threads()


def fail_with(message):
    raise UserError(message)


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("only here")
    return "fine"


def process_id():
    return os.getpid()


def die():
    os._exit(7)


def hang():
    time.sleep(3600)


def test_ranks_compute_together_and_stay_the_same_processes(ranks2):
    assert ranks2.run(sum_over_ranks, 3) == [(33.0, "0", 1), (33.0, "1", 1)]
    first = ranks2.run(process_id)
    assert len({*first, os.getpid()}) == 3 and ranks2.run(process_id) == first


def test_an_exception_of_a_rank_is_raised_in_the_test_with_its_traceback(ranks2):
    with pytest.raises(UserError, match="the key 'x'") as caught:
        ranks2.run(fail_with, "the key 'x'")
    assert isinstance(caught.value.__cause__, RankTraceback) and "in fail_with" in str(caught.value.__cause__)
    with pytest.raises(ValueError, match="only here"):
        ranks2.run(fail_on_rank_1)
    assert ranks2.run(sum_over_ranks, 1)[1][0] == 11.0


@pytest.mark.full
def test_a_hang_or_a_death_ends_with_a_message_and_the_pool_starts_anew():
    pool = RankPool(1)
    try:
        (hung,) = pool.run(process_id)
        with pytest.raises(RankTimeout, match=r"hang: no answer from ranks \[0\] of 1 in 1 s"):
            pool.run(hang, timeout=1.0)
        with pytest.raises(ProcessLookupError):
            os.kill(hung, 0)
        assert pool.run(sum_over_ranks, 2)[0][0] == 2.0
        with pytest.raises(RankDied, match="rank 0 of 1 ended with 7"):
            pool.run(die)
    finally:
        pool.close()
