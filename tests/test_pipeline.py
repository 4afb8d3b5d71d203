"""The pipeline: stages over lists, each sample once over ranks, resume = no stop, and never an endless loop."""

import json
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dalle_ds.config import InputError
from dalle_ds.data.pipeline import Batch, Placed, Reader, batch_samples, collate, decode_ahead, leave_out_bad, shuffle
from dalle_ds.data.skips import BadSample, SkipLog
from dalle_ds.data.sources import Sample, Source


def source_of(*part_lens: int) -> Source:
    """Parts of these lengths, whose samples count up from 0 over all parts."""
    starts = np.cumsum([0, *part_lens])

    def read_part(part: str, log: SkipLog) -> Iterator[Sample]:
        for index in range(int(part_lens[int(part)])):
            yield {"key": str(starts[int(part)] + index), "origin": part}

    return Source([str(index) for index in range(len(part_lens))], read_part)


def number(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    return {"number": int(sample["key"]), "noise": rng.random()}


def number_not_3_nor_4(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    if sample["key"] in "34":
        raise BadSample("three or four")
    return number(sample, rng)


def all_bad(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    raise BadSample("broken")


def numbers(batches: Iterator[Batch] | Reader) -> list[int]:
    return [int(value) for batch in batches for value in batch["number"]]


def same(first: list[Batch], second: list[Batch]) -> bool:
    return [(list(b["number"]), list(b["noise"])) for b in first] == [
        (list(b["number"]), list(b["noise"])) for b in second
    ]


def test_shuffle_yields_every_sample_once_in_an_order_of_the_seed() -> None:
    samples = [{"n": n} for n in range(100)]
    orders = [[s["n"] for s in shuffle(iter(samples), 10, np.random.default_rng(seed))] for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(100))
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_shuffle_over_fewer_samples_than_the_buffer_shuffles_them() -> None:
    order = [s["n"] for s in shuffle(iter([{"n": n} for n in range(20)]), 1000, np.random.default_rng(0))]
    assert sorted(order) == list(range(20)) != order


def test_a_buffer_of_one_keeps_the_order() -> None:
    assert list(shuffle(iter([{"n": 1}, {"n": 0}]), 1, np.random.default_rng(0))) == [{"n": 1}, {"n": 0}]


def test_decoding_ahead_keeps_the_order_and_its_bound() -> None:
    read = 0

    def raw() -> Iterator[Placed]:
        nonlocal read
        for position in range(50):
            read += 1
            yield Placed(0, position, {})

    def decode(placed: Placed) -> Placed:
        time.sleep(0.002 * (placed.position % 3 == 0))
        return placed

    positions = []
    for placed in decode_ahead(raw(), decode, n_worker=3, n_ahead=8):
        assert read <= placed.position + 1 + 8
        positions.append(placed.position)
    assert positions == list(range(50))


def test_bad_samples_are_logged_and_an_epoch_of_them_is_refused() -> None:
    log = SkipLog()
    stream = [Placed(0, 0, {"key": "a", "origin": "o"}, "why"), Placed(0, 1, {}), Placed(1, 0, {"key": "a"}, "why")]
    good = leave_out_bad(iter(stream), log)
    assert next(good) == stream[1]
    with pytest.raises(InputError, match=r"not one of 1 samples can be used: left out 2 .* first is a of o: why"):
        next(good)


def test_batches_carry_the_place_behind_their_last_sample() -> None:
    stream = [Placed(0, 0, {"n": 0}), Placed(0, 4, {"n": 1}), Placed(1, 2, {"n": 2})]
    assert [place for _, place in batch_samples(stream, 2, drop_last=True)] == [(0, 5)]
    assert [place for _, place in batch_samples(stream, 2, drop_last=False)] == [(0, 5), (1, 3)]


def test_collate_stacks_arrays_and_numbers_and_lists_the_rest() -> None:
    batch = collate([{"x": np.zeros((2, 3), np.uint8), "n": n, "caption": str(n), "truth": None} for n in range(4)])
    assert batch["x"].shape == (4, 2, 3)
    assert batch["x"].dtype == np.uint8
    assert batch["n"].tolist() == [0, 1, 2, 3]
    assert (batch["caption"], batch["truth"]) == (["0", "1", "2", "3"], [None] * 4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("part_lens", [(5, 1, 8, 3, 3), (20,), (9, 11)])
def test_each_sample_goes_to_one_rank_once(world_size: int, part_lens: tuple[int, ...]) -> None:
    for shuffle_buffer in (1, 6):
        seen = []
        for rank in range(world_size):
            with Reader(
                source_of(*part_lens),
                number,
                4,
                rank=rank,
                world_size=world_size,
                shuffle_buffer=shuffle_buffer,
                epochs=1,
                drop_last=False,
            ) as reader:
                seen += numbers(reader)
        assert sorted(seen) == list(range(20))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def two_epochs(seed: int, n_worker: int) -> list[int]:
        with Reader(
            source_of(4, 4, 4, 4), number, 4, seed=seed, shuffle_buffer=5, n_worker=n_worker, epochs=2
        ) as reader:
            return numbers(reader)

    assert two_epochs(0, 1) == two_epochs(0, 3)
    assert two_epochs(0, 1) != two_epochs(1, 1)
    assert two_epochs(0, 1)[:16] != two_epochs(0, 1)[16:]


@pytest.mark.parametrize("decode", [number, number_not_3_nor_4])
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 1), (5, 3)])
def test_resume_is_the_same_as_no_stop(decode: Any, world_size: int, rank: int) -> None:
    def reader() -> Reader:
        options = {"rank": rank, "world_size": world_size, "seed": 7, "shuffle_buffer": 4, "n_worker": 2}
        return Reader(source_of(6, 7, 8), decode, 4, **options)

    with reader() as unbroken:
        batches = list(islice(unbroken, 16))
    for n_before in range(0, 12):
        with reader() as first:
            list(islice(first, n_before))
            state = json.loads(json.dumps(first.state_dict()))
        with reader() as second:
            second.load_state_dict(state)
            assert second.state_dict() == state
            assert same(list(islice(second, 4)), batches[n_before : n_before + 4])


def test_a_closed_reader_goes_on_where_it_stood() -> None:
    with Reader(source_of(9, 9), number, 4, shuffle_buffer=3) as unbroken:
        batches = list(islice(unbroken, 6))
    reader = Reader(source_of(9, 9), number, 4, shuffle_buffer=3)
    parts = list(islice(reader, 2))
    reader.close()
    parts += list(islice(reader, 4))
    reader.close()
    assert same(parts, batches)


def test_epochs_run_into_each_other_and_only_the_last_drops_a_rest() -> None:
    with Reader(source_of(5), number, 4, epochs=2) as reader:
        assert numbers(reader) == [0, 1, 2, 3, 4, 0, 1, 2]
    with Reader(source_of(5), number, 4, epochs=2, drop_last=False) as reader:
        assert numbers(reader) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_an_endless_reader_fills_batches_larger_than_the_data() -> None:
    with Reader(source_of(3), number, 8) as reader:
        assert [len(batch["number"]) for batch in islice(reader, 3)] == [8, 8, 8]


def test_bad_samples_are_left_out_and_named_once(tmp_path: Path) -> None:
    log = SkipLog(tmp_path / "skipped.jsonl")
    with Reader(source_of(6), number_not_3_nor_4, 2, epochs=3, log=log) as reader:
        assert numbers(reader) == [0, 1, 2, 5] * 3
    assert [json.loads(line)["key"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == ["3", "4"]
    assert log.n_skipped == 2
    with pytest.warns(UserWarning, match="left out 2"):
        log.warn()


@pytest.mark.parametrize("epochs", [None, 1])
def test_data_without_a_usable_sample_ends_in_an_error(epochs: int | None) -> None:
    with Reader(source_of(3, 3), all_bad, 2, epochs=epochs) as reader, pytest.raises(InputError, match="not one of 6"):
        next(reader)
    with Reader(source_of(0, 0), number, 2, epochs=epochs) as reader, pytest.raises(InputError, match="no sample"):
        next(reader)


def test_a_rank_without_samples_has_an_empty_pass_but_no_endless_loop() -> None:
    with Reader(source_of(2), number, 1, rank=2, world_size=3, epochs=1) as reader:
        assert list(reader) == []
    with Reader(source_of(2), number, 1, rank=2, world_size=3) as reader, pytest.raises(InputError, match="no sample"):
        next(reader)


def test_closing_stops_the_threads() -> None:
    before = threading.active_count()
    reader = Reader(source_of(1000), number, 4, n_worker=3)
    next(reader)
    assert threading.active_count() > before
    reader.close()
    assert threading.active_count() == before


def test_an_error_in_decoding_that_is_no_bad_sample_comes_through() -> None:
    def broken(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        raise ZeroDivisionError

    with Reader(source_of(3), broken, 1) as reader, pytest.raises(ZeroDivisionError):
        next(reader)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="batch_size 0"):
        Reader(source_of(3), number, 0)
    with pytest.raises(InputError, match="seed -1"):
        Reader(source_of(3), number, 1, seed=-1)
