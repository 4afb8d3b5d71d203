"""A run that stands still ends, and one line names the ranks that did not arrive."""

import subprocess
import sys

import pytest
from helpers import rank_variables, run_distributed
from test_commands import ROOT, environment

from dalle_ds.training.watch import Standing, verdict

# Ranks reduce at each step; at the third, the last one does what the argument says. The timeout is 6 seconds.
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
        if step == 3 and ranks.rank == ranks.world_size - 1:
            sleep_in_a_step() if sys.argv[1] == "sleep" else os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))
"""
LIMIT = 120  # seconds, of which this needs twenty


def run_ranks(world_size, what):
    """The program on ranks of its own; the exit codes and what was said of those that end by themselves."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, what],
            env={**environment(), **variables},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for variables in rank_variables(world_size)
    ]
    try:
        ending = ranks if what == "sleep" else ranks[:-1]
        said = [rank.communicate(timeout=LIMIT)[0] for rank in ending]
        return [rank.returncode for rank in ending], said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named_with_its_step_and_place_and_all_end():
    codes, said = run_ranks(3, "sleep")
    assert codes == [1, 1, 1], said
    [line] = "".join(said).splitlines()
    assert line.startswith("dalle-ds: error: nothing moved for 0.1 minutes: rank 2 did not arrive: on ")
    assert "in step 3, at <string>:" in line
    assert "(sleep_in_a_step); rank 0 on " in line
    assert "waits in step 3 at" in line
    assert "(all_reduce)" in line


@pytest.mark.slow
def test_a_process_that_is_stopped_is_named_by_its_silence():
    codes, said = run_ranks(2, "stop")
    assert codes == [1], said
    [line] = said[0].splitlines()
    assert "rank 1 did not arrive and does not answer; rank 0 on " in line


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
