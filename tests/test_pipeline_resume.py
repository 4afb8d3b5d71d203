"""Where a reader stands: one state for all ranks, resumed by any number of ranks and workers, none lost, none twice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sources import Ranks, assert_each_once, number_not_3_nor_4, numbers, source_of

from dalle_ds.config import InputError
from dalle_ds.data.pipeline import Reader
from dalle_ds.data.sources import Sample, open_source
from dalle_ds.data.writer import write_shard

SHUFFLED = {"shuffle_buffer": 24, "n_lanes": 4, "block_len": 4}
IN_ORDER = {"shuffle_buffer": 1}
# Uneven shards, fewer shards than ranks, one sample a shard, and an empty one.
PARTS = [(23, 1, 40, 8), (72,), (1,) * 72, (70, 0, 2)]
# World size, batch size, workers: 12 samples a step.
LAYOUTS = [(2, 6, 2), (4, 3, 1), (1, 12, 3), (3, 4, 1), (12, 1, 1)]


@pytest.mark.parametrize("how", [SHUFFLED, IN_ORDER], ids=["shuffled", "in-order"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_every_epoch_holds_every_sample_once_and_all_layouts_have_the_same_batches(parts: Any, how: Any) -> None:
    runs = []
    for world_size, batch_size, n_worker in LAYOUTS:
        with Ranks(world_size, source_of(*parts), batch_size, seed=3, n_worker=n_worker, **how) as ranks:
            runs.append(ranks.steps(18))
    assert all(run == runs[0] for run in runs)
    for epoch in range(3):
        assert_each_once(numbers(runs[0])[72 * epoch : 72 * (epoch + 1)], 72)


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_a_run_that_changes_ranks_and_workers_again_and_again_loses_and_repeats_nothing(parts: Any) -> None:
    """2 ranks x 2 workers -> 4 x 1 -> 1 x 3 -> ..., with epochs (of 72) that end in the middle of batches (of 10)."""
    layouts = [(2, 5, 2), (5, 2, 1), (1, 10, 3), (2, 5, 1), (10, 1, 1)]
    with Ranks(1, source_of(*parts), 10, seed=3, **SHUFFLED) as unbroken:
        expected = unbroken.steps(4 * len(layouts))
    found, state = [], None
    for world_size, batch_size, n_worker in layouts:
        with Ranks(world_size, source_of(*parts), batch_size, seed=3, n_worker=n_worker, **SHUFFLED) as ranks:
            if state is not None:
                ranks.load(state)
                assert ranks.state() == state
            found += ranks.steps(4)
            state = json.loads(json.dumps(ranks.state()))
    assert found == expected
    assert (state["epoch"], state["position"]) == divmod(4 * 10 * len(layouts), 72)
    assert_each_once(numbers(found)[:72], 72)


def test_another_global_batch_goes_on_at_the_same_sample() -> None:
    found: list[int] = []
    state = None
    for world_size, batch_size, n_steps in [(2, 4, 3), (4, 2, 1), (1, 3, 2), (3, 1, 5), (5, 7, 1)]:
        with Ranks(world_size, source_of(30, 58), batch_size, seed=3, **SHUFFLED) as ranks:
            if state is not None:
                ranks.load(state)
            found += numbers(ranks.steps(n_steps))
            state = ranks.state()
    assert len(found) == 88
    assert_each_once(found, 88)
    assert (state["epoch"], state["position"]) == (1, 0)


@pytest.mark.parametrize("decode", [None, number_not_3_nor_4], ids=["good", "bad-samples"])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_resume_is_the_same_as_no_stop_bit_for_bit(world_size: int, decode: Any) -> None:
    def ranks() -> Ranks:
        options: dict[str, Any] = {"seed": 7, "n_worker": 2, **SHUFFLED} | ({"decode": decode} if decode else {})
        return Ranks(world_size, source_of(6, 7, 8), 4, **options)

    with ranks() as unbroken:
        steps = [unbroken.step() for _ in range(16)]
    for n_before in range(0, 12, 2):
        with ranks() as first:
            first.steps(n_before)
            state = json.loads(json.dumps(first.state()))
        with ranks() as second:
            assert [second.load(state).step(), *(second.step() for _ in range(3))] == steps[n_before : n_before + 4]


def test_a_closed_reader_goes_on_where_it_stood() -> None:
    with Ranks(1, source_of(9, 9), 4, **SHUFFLED) as unbroken:
        expected = unbroken.steps(6)
    with Ranks(1, source_of(9, 9), 4, **SHUFFLED) as ranks:
        found = ranks.steps(2)
        ranks.readers[0].close()
        found += ranks.steps(4)
    assert found == expected


def test_the_numbers_of_a_sample_are_its_own_in_each_epoch() -> None:
    with Ranks(1, source_of(50), 5, **SHUFFLED) as one, Ranks(5, source_of(50), 1, **SHUFFLED) as five:
        epochs = [dict(one.steps(10)) for _ in range(2)]
        assert dict(five.steps(10)) == epochs[0]
    assert all(epochs[0][number] != epochs[1][number] for number in range(50))


@pytest.mark.parametrize(
    ("parts", "options", "words"),
    [
        ((9, 9), {}, "n_samples was 19 and is 18; parts was"),
        ((9, 10), {"seed": 4}, "seed was 3 and is 4"),
        ((9, 10), {"n_lanes": 8}, "n_lanes was 4 and is 8"),
        ((9, 10), {"shuffle_buffer": 1}, "shuffle_buffer was 24 and is 1"),
    ],
)
def test_other_data_and_another_order_are_refused_in_one_line(parts: Any, options: Any, words: str) -> None:
    with Ranks(1, source_of(9, 10), 2, seed=3, **SHUFFLED) as ranks:
        state = ranks.state()
    other = Reader(source_of(*parts), number_not_3_nor_4, 2, **{"seed": 3, **SHUFFLED, **options})
    with pytest.raises(InputError, match=words) as error:
        other.load_state_dict(state)
    assert "\n" not in str(error.value)


# --- killed -----------------------------------------------------------------------------------------------------------

N_KEYS, SAVE_EVERY = 90, 3

PROGRAM = """
import json, os, sys
from pathlib import Path
from test_pipeline_resume import SAVE_EVERY, key_of, ranks_of

data, run, world_size, batch_size, n_worker = sys.argv[1:3] + [int(word) for word in sys.argv[3:]]
saved = Path(run) / "saved.json"
with ranks_of(data, world_size, batch_size, n_worker) as ranks:
    keys = []
    if saved.exists():
        content = json.loads(saved.read_text())
        ranks.load(content["state"])
        keys = content["keys"]
    for step, _ in enumerate(sys.stdin, start=1):
        keys += [key for key, _ in ranks.step()]
        if step % SAVE_EVERY == 0:
            partial = saved.with_suffix(".partial")
            partial.write_text(json.dumps({"state": ranks.state(), "keys": keys}))
            partial.replace(saved)
        print(len(keys), flush=True)
"""


def key_of(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    return {"number": int(sample["caption"]), "noise": rng.random()}


def ranks_of(data: str, world_size: int, batch_size: int, n_worker: int) -> Ranks:
    return Ranks(world_size, open_source(data), batch_size, key_of, seed=2, n_worker=n_worker, **SHUFFLED)


def train(data: Path, run: Path, layout: tuple[int, int, int], n_steps: int) -> int:
    """Makes so many steps in a process of its own, kills it, and returns how many keys it had by then."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    words = [sys.executable, "-c", PROGRAM, str(data), str(run), *map(str, layout)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, **pipes) as child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("step\n" * n_steps)
            child.stdin.flush()
            return [int(child.stdout.readline()) for _ in range(n_steps)][-1]
        finally:
            child.kill()


def test_after_kill_9_in_the_middle_of_an_epoch_the_keys_of_the_epoch_are_exact(tmp_path: Path) -> None:
    """Tar shards of uneven lengths, read by 2 ranks x 2 workers, killed; then by 4 x 1, killed; then by 1 x 3."""
    sizes, at = (7, 40, 1, 13, 29), 0
    for shard, size in enumerate(sizes):
        write_shard(tmp_path / "data", shard, [{"png": b"p", "txt": str(at + n).encode()} for n in range(size)])
        at += size
    assert at == N_KEYS
    data = tmp_path / "data"
    # Saved every third step: two steps of 4, and one of 4, are lost with the process and made again.
    assert train(data, tmp_path, (2, 2, 2), 8) == 32
    assert train(data, tmp_path, (4, 1, 1), 7) == 24 + 28
    assert train(data, tmp_path, (1, 2, 3), 21) == 24 + 24 + 42
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert (saved["state"]["epoch"], saved["state"]["position"]) == (1, 0)
    assert_each_once(saved["keys"], N_KEYS)
