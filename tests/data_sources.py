"""Sources without files, for tests of what reads them."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from dalle_ds.data.pipeline import Reader
from dalle_ds.data.skips import BadSample
from dalle_ds.data.sources import Sample, Source


def source_of(*part_lens: int, first: int = 0) -> Source:
    """Parts of these lengths, whose samples count up from `first` over all parts."""
    starts = first + np.cumsum([0, *part_lens])

    def read_slots(part: str, begin: int, end: int | None) -> Iterator[Sample]:
        number = int(part.rpartition("-")[2])
        for index in range(begin, part_lens[number] if end is None else end):
            yield {"key": str(starts[number] + index), "origin": part}

    def count(parts: list[str]) -> list[int]:
        return [part_lens[int(part.rpartition("-")[2])] for part in parts]

    return Source([f"{first}-{index}" for index in range(len(part_lens))], read_slots, count)  # type: ignore[arg-type]


def number(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    return {"number": int(sample["key"]), "noise": rng.random()}


def number_not_3_nor_4(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
    if sample["key"] in ("3", "4"):
        raise BadSample("three or four")
    return number(sample, rng)


class Ranks:
    """The readers of several ranks, in step."""

    def __init__(self, world_size: int, source: Source, batch_size: int, decode: Any = number, **options: Any) -> None:
        self.readers = [
            Reader(source, decode, batch_size, rank=rank, world_size=world_size, **options)
            for rank in range(world_size)
        ]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self.readers:
            reader.close()

    def load(self, state: dict[str, Any]) -> "Ranks":
        for reader in self.readers:
            reader.load_state_dict(state)
        return self

    def state(self) -> dict[str, Any]:
        """The one state of all ranks."""
        states = [reader.state_dict() for reader in self.readers]
        assert all(state == states[0] for state in states)
        return states[0]

    def step(self) -> list[tuple[int, float]]:
        """(number, noise) of each sample of the next batch of all ranks, in the order of the stream."""
        batches = [next(reader) for reader in self.readers]
        by_rank = [list(zip(batch["number"].tolist(), batch["noise"].tolist(), strict=True)) for batch in batches]
        return [sample for row in zip(*by_rank, strict=True) for sample in row]

    def steps(self, n: int) -> list[tuple[int, float]]:
        return [sample for _ in range(n) for sample in self.step()]


def numbers(samples: Any) -> list[int]:
    return [number for number, _ in samples]


def assert_each_once(found: list[int], n: int) -> None:
    assert Counter(found) == Counter(range(n))


def take(reader: Reader, n: int) -> list[int]:
    """The first n numbers."""
    found: list[int] = []
    for batch in islice(reader, -(-n // reader.batch_size)):
        found += batch["number"].tolist()
    return found[:n]
