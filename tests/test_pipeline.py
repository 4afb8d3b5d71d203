"""The pipeline: stages over lists, threads that stop, what stands in for bad samples, and never an endless loop."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sources import Ranks, number, number_not_3_nor_4, numbers, source_of, take

from dalle_ds.config import DataConfig, InputError, ReadConfig
from dalle_ds.data.index import ShardEntry, index_shards, write_index
from dalle_ds.data.mixture import Place
from dalle_ds.data.order import Window
from dalle_ds.data.pipeline import (
    N_STAND_INS,
    Placed,
    Reader,
    batch_samples,
    collate,
    decode_ahead,
    fetch_ahead,
    leave_out_bad,
    training_reader,
)
from dalle_ds.data.skips import BadSample, SkipLog
from dalle_ds.data.sources import Sample, Source, open_source
from dalle_ds.data.writer import ShardWriter

SHUFFLED = {"shuffle_buffer": 16, "n_lanes": 4, "block_len": 4}


def placed(number: int, sample: dict[str, Any] | None) -> Placed:
    return Placed(Place(number, 0, 0, number, Window(0, 0, 0), 0), sample)


def all_bad(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    raise BadSample("broken")


def test_decoding_ahead_keeps_the_order_and_its_bound() -> None:
    read = 0

    def raw() -> Iterator[int]:
        nonlocal read
        for position in range(50):
            read += 1
            yield position

    def decode(position: int) -> int:
        time.sleep(0.002 * (position % 3 == 0))
        return position

    positions = []
    for position in decode_ahead(raw(), decode, n_worker=3, n_ahead=8):
        assert read <= position + 1 + 8
        positions.append(position)
    assert positions == list(range(50))


def test_fetching_ahead_loads_each_window_once_and_holds_few() -> None:
    n_lanes, window_len, n_windows = 4, 8, 10
    loaded, held = [], set()

    class Slots(list[Any]):
        def __del__(self) -> None:
            held.discard(id(self))

    def load(key: tuple[int, int]) -> list[Any]:
        loaded.append(key)
        slots = Slots({"n": (*key, offset)} for offset in range(window_len))
        held.add(id(slots))
        assert len(held) <= 3 * n_lanes
        return slots

    def places() -> Iterator[Place]:
        for n in range(n_lanes * window_len * n_windows):
            row, lane = divmod(n, n_lanes)
            yield Place(n, 0, 0, n, Window(0, lane, row // window_len), row % window_len)

    def key(place: Place) -> tuple[int, tuple[int, int]]:
        return place.window.lane, (place.window.lane, place.window.number)

    found = [(place.number, sample["n"]) for place, sample in fetch_ahead(places(), key, load, 2, n_lanes * window_len)]
    assert [n for n, _ in found] == list(range(n_lanes * window_len * n_windows))
    assert len({sample for _, sample in found}) == len(found)
    assert len(loaded) == len(set(loaded)) == n_lanes * n_windows


def test_what_is_bad_is_left_out_and_nothing_but_bad_is_refused() -> None:
    log = SkipLog()
    log.add("a", "o", "why")
    stream = [placed(0, None), placed(1, {"n": 1}), placed(2, None)]
    assert list(leave_out_bad(iter(stream), log)) == stream[1:2]
    with pytest.raises(InputError, match=r"not one of 2 samples can be used: left out 1 .* first is a of o: why"):
        list(leave_out_bad(stream[:1] * 2, log))


def test_batches_carry_the_place_of_their_last_sample() -> None:
    stream = [placed(n, {"n": n}) for n in (0, 4, 7)]
    assert [place.number for _, place in batch_samples(stream, 2, drop_last=True)] == [4]
    assert [place.number for _, place in batch_samples(stream, 2, drop_last=False)] == [4, 7]


def test_collate_stacks_arrays_and_numbers_and_lists_the_rest() -> None:
    batch = collate([{"x": np.zeros((2, 3), np.uint8), "n": n, "caption": str(n), "truth": None} for n in range(4)])
    assert batch["x"].shape == (4, 2, 3)
    assert batch["x"].dtype == np.uint8
    assert batch["n"].tolist() == [0, 1, 2, 3]
    assert (batch["caption"], batch["truth"]) == (["0", "1", "2", "3"], [None] * 4)


def test_epochs_run_into_each_other_and_only_the_last_drops_a_rest() -> None:
    with Reader(source_of(5), number, 4, epochs=2) as reader:
        assert take(reader, 10) == [0, 1, 2, 3, 4, 0, 1, 2]
    with Reader(source_of(5), number, 4, epochs=2, drop_last=False) as reader:
        assert take(reader, 99) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_an_endless_reader_fills_batches_larger_than_the_data() -> None:
    with Reader(source_of(3), number, 8) as reader:
        assert [len(batch["number"]) for batch in islice(reader, 3)] == [8, 8, 8]


# --- bad samples ------------------------------------------------------------------------------------------------------


def test_a_pass_leaves_bad_samples_out_and_names_them_once(tmp_path: Path) -> None:
    log = SkipLog(tmp_path / "skipped.jsonl")
    with Reader(source_of(6), number_not_3_nor_4, 2, epochs=3, log=log) as reader:
        assert take(reader, 99) == [0, 1, 2, 5] * 3
    assert [json.loads(line)["key"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == ["3", "4"]
    assert log.n_skipped == 2
    with pytest.warns(UserWarning, match="left out 2"):
        log.warn()


def test_without_end_another_sample_stands_in_whatever_the_number_of_ranks_and_workers() -> None:
    log = SkipLog()
    by_world = []
    for world_size in (1, 2, 3):
        options = {"n_worker": 3, "seed": 4, "log": log, **SHUFFLED}
        with Ranks(world_size, source_of(10, 20), 6 // world_size, number_not_3_nor_4, **options) as ranks:
            by_world.append(ranks.steps(20))
    assert by_world[0] == by_world[1] == by_world[2]
    for epoch in range(4):
        found = numbers(by_world[0][30 * epoch : 30 * (epoch + 1)])
        assert len(set(found)) == 28, "every good sample is there"
        assert not {3, 4} & set(found)
    assert log.n_skipped == 2


@pytest.mark.parametrize("epochs", [None, 1])
def test_data_without_a_usable_sample_ends_in_an_error(epochs: int | None) -> None:
    with Reader(source_of(3, 3), all_bad, 2, epochs=epochs) as reader, pytest.raises(InputError, match="not one of 6"):
        next(reader)
    with pytest.raises(InputError, match=r"0-0 and 1 more: no sample to read: .* the shard holds no sample"):
        Reader(source_of(0, 0), number, 2, epochs=epochs)


def test_large_data_without_a_usable_sample_are_given_up_after_some() -> None:
    reader = Reader(source_of(5_000), all_bad, 2)
    with reader, pytest.raises(InputError, match=f"not one of {N_STAND_INS} samples can be used"):
        next(reader)


def test_a_rank_without_samples_has_an_empty_pass() -> None:
    with Reader(source_of(2), number, 1, rank=2, world_size=3, epochs=1) as reader:
        assert list(reader) == []


def write_shards(folder: Path, n: int) -> str:
    with ShardWriter(folder, 4) as writer:
        for index in range(n):
            writer.write({"png": b"p" * 700, "txt": str(index).encode()})
    return str(folder)


def by_caption(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    assert sample["image"] == b"p" * 700
    return {"number": int(sample["caption"]), "noise": rng.random()}


def test_shards_are_sought_and_what_damage_there_is_gets_named(tmp_path: Path) -> None:
    """The second shard is cut inside its third sample, the third one is empty, the fourth is no tar."""
    folder = Path(write_shards(tmp_path, 18))
    cut, empty, other = (folder / f"{number:05d}.tar" for number in (1, 2, 3))
    cut.write_bytes(cut.read_bytes()[: 2 * 2560 + 800])
    empty.write_bytes(bytes(10240))
    other.write_bytes(b"no tar" * 1000)
    log = SkipLog(tmp_path / "skipped.jsonl")
    with Ranks(2, open_source(str(folder)), 5, by_caption, seed=1, log=log, **SHUFFLED) as ranks:
        found = numbers(ranks.steps(10))
    good = {0, 1, 2, 3, 4, 5, 16, 17}
    assert set(found) == good
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    reasons = {(Path(line["origin"]).name, line["key"]): line["reason"] for line in lines}
    assert "truncated" in reasons["00001.tar", ""]
    assert reasons["00002.tar", ""] == "the tar is empty"
    assert "truncated or damaged" in reasons["00003.tar", ""]


def test_wrong_bytes_of_an_indexed_shard_end_the_run_or_count_as_bad(
    tmp_path: Path,
) -> None:
    folder = Path(write_shards(tmp_path, 16))
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    write_index((url, entry) for url, entry, _ in index_shards(urls) if isinstance(entry, ShardEntry))
    content = bytearray(Path(urls[2]).read_bytes())
    content[600] ^= 1
    Path(urls[2]).write_bytes(content)
    patience: dict[str, Any] = {"n_attempt": 2, "backoff_seconds": 0.0}
    source = open_source(str(folder), ReadConfig(**patience))
    with Reader(source, by_caption, 5, **SHUFFLED) as reader, pytest.raises(InputError, match=r"00002\.tar .*CRC-32"):
        take(reader, 16)
    log = SkipLog()
    source = open_source(str(folder), ReadConfig(failed_shards=1, **patience))
    with Reader(source, by_caption, 4, log=log, **SHUFFLED) as reader:
        assert set(take(reader, 16)) == {*range(8), *range(12, 16)}
    assert "CRC-32" in log.summary()


# --- threads ----------------------------------------------------------------------------------------------------------


def n_threads() -> int:
    return sum(thread.name.startswith(("read", "decode")) for thread in threading.enumerate())


def test_closing_stops_the_threads() -> None:
    reader = Reader(source_of(1000), number, 4, n_worker=3)
    next(reader)
    assert n_threads() > 3
    reader.close()
    assert n_threads() == 0


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_decoding_that_is_no_bad_sample_comes_through_and_stops_the_threads(error: Any) -> None:
    def broken(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        raise error

    reader = Reader(source_of(30), broken, 1)
    with pytest.raises(error):
        next(reader)
    assert n_threads() == 0


def test_an_error_in_reading_comes_through_and_stops_the_threads() -> None:
    def read_slots(part: str, begin: int, end: int | None) -> Iterator[Sample]:
        yield from ()
        raise InputError(f"{part}: gone")

    reader = Reader(Source(["a"], read_slots, lambda parts: [9]), number, 1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a: gone"):
        next(reader)
    assert n_threads() == 0


def test_an_interrupted_program_ends_though_its_reader_was_not_closed() -> None:
    """A signal in the middle of an endless reading, of samples that take their time."""
    program = """
import time
from data_sources import source_of
from dalle_ds.data.pipeline import Reader

def slow(sample, rng):
    time.sleep(0.01)
    return {"key": sample["key"]}

reader = Reader(source_of(100_000), slow, 4, n_worker=2, shuffle_buffer=64)
for batch in reader:
    print(batch["key"], flush=True)
"""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline()
        child.send_signal(2)
        _, said = child.communicate(timeout=20)
    finally:
        child.kill()
    assert child.returncode != 0
    assert said.decode().rstrip().endswith("KeyboardInterrupt")


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="batch_size 0"):
        Reader(source_of(3), number, 0)
    with pytest.raises(InputError, match="seed -1"):
        Reader(source_of(3), number, 1, seed=-1)


def test_a_training_reader_is_as_the_settings_say_and_warns_of_lanes_that_ranks_do_not_divide() -> None:
    data = DataConfig(shuffle_buffer=12, n_lanes=6, block_len=5, n_worker=2)
    make = training_reader(source_of(40), number, data, rank=0, world_size=3, seed=2, log=SkipLog())
    with (
        make(4) as reader,
        Reader(source_of(40), number, 4, world_size=3, seed=2, shuffle_buffer=12, n_lanes=6, block_len=5) as same,
    ):
        assert take(reader, 40) == take(same, 40)
    with pytest.warns(UserWarning, match=r"--data\.n_lanes 6 is no multiple of the 4 processes"):
        training_reader(source_of(40), number, data, rank=0, world_size=4, seed=2, log=SkipLog())
