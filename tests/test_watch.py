"""A run that stands still ends, and one line names the ranks that did not arrive."""

import signal
import sys
import time

import pytest
from helpers import run_distributed
from programs import LIMIT, ROOT, Ranks
from test_preemption import last_step, small_batches

from dalle_ds.training.watch import Standing, verdict

# Ranks reduce at each step; at the third, one of them does what the arguments say. The timeout is 6 seconds.
PROGRAM = """
import os, signal, sys, time
import torch, torch.distributed as dist
from dalle_ds.training.distributed import process_group
from dalle_ds.training.watch import Watch

def sleep_in_a_step():
    time.sleep(1000)

with process_group(0.1) as ranks, Watch(0.1) as watch:
    for step in range(1, 5):
        watch.beat(step)
        if step == 3 and ranks.rank == int(sys.argv[2]):
            sleep_in_a_step() if sys.argv[1] == "sleep" else os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))
"""


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named_with_its_step_and_place_and_all_end():
    with Ranks([sys.executable, "-c", PROGRAM, "sleep", 2], 3) as ranks:
        codes, said = ranks.ended()
    assert codes == [1, 1, 1], said
    [line] = "".join(said).splitlines()
    assert line.startswith("dalle-ds: error: nothing moved for 0.1 minutes: rank 2 did not arrive: on ")
    assert "in step 3, at <string>:" in line
    assert "(sleep_in_a_step); rank 0 on " in line
    assert "waits in step 3 at" in line
    assert "(all_reduce)" in line


@pytest.mark.slow
def test_a_process_that_is_stopped_is_named_by_its_silence():
    with Ranks([sys.executable, "-c", PROGRAM, "stop", 2], 3) as ranks:
        codes, said = ranks.ended(but=2)
    assert codes == [1, 1], said
    [line] = "".join(said).splitlines()
    assert "rank 2 did not arrive and does not answer; rank 0 on " in line


SILENT_STORE = "nothing moved for 0.1 minutes: rank 0, which holds the store, does not answer; rank "


@pytest.mark.slow
def test_the_first_rank_too_whose_process_holds_the_store():
    """Bug: the others asked it where it stands, and waited for its answer for ever."""
    with Ranks([sys.executable, "-c", PROGRAM, "stop", 0], 3) as ranks:
        codes, said = ranks.ended(but=0)
    assert codes == [1, 1], said
    for rank, text in enumerate(said, 1):
        [line] = text.splitlines()
        assert f"{SILENT_STORE}{rank} on " in line
        assert "waits in step 3 at" in line


@pytest.mark.slow
def test_a_training_run_whose_first_rank_is_stopped_ends_and_says_why(chain, tmp_path):
    out = tmp_path / "run"
    flags = ["--deepspeed_config", small_batches(chain.root), "--loop.steps", "100000", "--loop.timeout_minutes", "0.1"]
    command = [sys.executable, ROOT / "launch/train_prior.py", *chain.train_prior(out, *flags)[1:]]
    with Ranks(command, 3) as ranks:
        deadline = time.monotonic() + LIMIT
        while last_step(out) < 3:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in ranks.ranks), ranks.ended()
            time.sleep(0.02)
        ranks.ranks[0].send_signal(signal.SIGSTOP)
        codes, said = ranks.ended(but=0)
    assert codes == [1, 1], said
    for rank, text in enumerate(said, 1):
        assert f"dalle-ds: error: {SILENT_STORE}{rank} on " in text


def timeouts_of_groups():
    """Minutes that collectives wait in the group of all, and in one that is made later as DeepSpeed makes its own."""
    import torch
    import torch.distributed as dist

    from dalle_ds.training.distributed import process_group

    with process_group(20):
        groups = dist.group.WORLD, dist.new_group([0])
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60 for group in groups]


def test_collectives_of_every_group_outlast_the_watch_by_a_minute():
    assert run_distributed(timeouts_of_groups, 1) == [[21, 21]]


def standing(step, n_collectives, place="loop.py:1 (train)"):
    return Standing(step, n_collectives, "node", place)


@pytest.mark.parametrize(
    ("standings", "speaker", "named"),
    [
        (
            [standing(3, 9), standing(3, 8, "data.py:5 (read)")],
            0,
            "rank 1 did not arrive: on node, in step 3, at data.py",
        ),
        ([standing(2, 9), standing(3, 8), standing(3, 8)], 1, "rank 0 did not arrive: on node, in step 2"),
        ([standing(3, 9), standing(3, 8), standing(3, 7)], 0, "ranks 1, 2 did not arrive"),
        ([standing(3, 9), None, standing(3, 9)], 0, "rank 1 did not arrive and does not answer"),
        ([None, standing(3, 9)], 1, "rank 0 did not arrive and does not answer"),
        ([standing(3, 9), standing(3, 9)], 0, "no rank is behind another, so look at the network"),
        ([standing(3, 9)] + [standing(3, 8)] * 11, 0, "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more did not arrive"),
    ],
)
def test_the_ranks_that_came_less_far_are_named_by_the_first_that_came_farther(standings, speaker, named):
    given = {rank: found for rank, found in enumerate(standings) if found is not None}
    spoke, said = verdict(given, len(standings), 30)
    assert spoke == speaker
    assert said.startswith(f"nothing moved for 30 minutes: {named}")
    assert "\n" not in said


def test_where_the_store_is_silent_each_rank_speaks_for_itself():
    spoke, said = verdict({3: standing(3, 9)}, 4, 30, heard=False)
    assert spoke == 3
    assert "rank 0, which holds the store, does not answer; rank 3 on node waits in step 3 at loop.py:1" in said
