"""run_distributed: a rank that fails is heard, and one that does not end is ended."""

import os
import time

import pytest
from helpers import run_distributed


def fail_on_rank_1():
    if os.environ["RANK"] == "1":
        raise KeyError("a mistake of rank 1")
    time.sleep(60)


def sleep_long():
    time.sleep(60)


@pytest.mark.slow
def test_run_distributed_shows_the_traceback_of_the_rank_that_failed():
    with pytest.raises(Exception, match=r"(?s)fail_on_rank_1.*a mistake of rank 1"):
        run_distributed(fail_on_rank_1, 2)


@pytest.mark.slow
def test_run_distributed_ends_ranks_that_do_not_end():
    with pytest.raises(TimeoutError, match=r"sleep_long: ranks \[0, 1\] of 2"):
        run_distributed(sleep_long, 2, timeout=8)


def ranks_and_sum(addend):
    import torch.distributed as dist

    from dalle_ds.training.distributed import process_group

    with process_group() as ranks:
        values = [None] * ranks.world_size
        dist.all_gather_object(values, ranks.rank + addend)
        return ranks.rank, ranks.is_first, ranks.device.type, values


@pytest.mark.slow
def test_run_distributed_returns_what_each_rank_returned():
    results = run_distributed(ranks_and_sum, 2, 10)
    assert results == [(0, True, "cpu", [10, 11]), (1, False, "cpu", [10, 11])]
