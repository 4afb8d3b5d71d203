"""From a source to batches: an order fixed by the seed, threads that decode ahead, and a place to resume from.

A pipeline of generators, each from iterator to iterator (the shape of webdataset's): order_samples -> shuffle -> decode
-> batch. Every sample carries its place (epoch, position), so the place of the last sample delivered is all the state.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from typing import Any, NamedTuple, Protocol

import numpy as np

from dalle_ds.config import DataConfig, InputError, require
from dalle_ds.data.skips import BadSample, SkipLog
from dalle_ds.data.sources import Sample, Source

Batch = dict[str, Any]

# Samples that wait, decoded or being decoded, beyond the batch under way: a thread's worth, and a batch's.
AHEAD_PER_WORKER, AHEAD_BATCHES = 4, 1
# First numbers of the seeds, so that no two uses draw the same numbers.
PART_SEED, SHUFFLE_SEED, SAMPLE_SEED = range(3)


class Decode(Protocol):
    """Turns a sample into the fields of a batch, or raises BadSample; `rng` is the sample's own."""

    def __call__(self, sample: Sample, rng: np.random.Generator, /) -> dict[str, Any]: ...


class Placed(NamedTuple):
    """A sample, raw or decoded, or the reason why it is left out, at `position` (from 0) of this rank's epoch."""

    epoch: int
    position: int
    sample: dict[str, Any]
    bad: str = ""


class Reader:
    """Batches of a source: without end, or `epochs` times over it.

    Batches run on from one epoch into the next, so nothing is left over but at the end of the last one (`drop_last`).
    The order is a pure function of (seed, epoch, rank, world_size). With fewer parts than ranks, ranks divide the
    samples instead of the parts. Samples that cannot be used go to `log`; an epoch without a usable one raises
    InputError. Close it, or use it in a `with` statement, to stop its threads.
    """

    def __init__(
        self,
        source: Source,
        decode: Decode,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 1,
        n_worker: int = 1,
        epochs: int | None = None,
        drop_last: bool = True,
        log: SkipLog | None = None,
    ) -> None:
        require(batch_size >= 1, f"batch_size {batch_size} must be at least 1")
        require(seed >= 0, f"seed {seed} must not be negative")
        assert 0 <= rank < world_size
        self.source, self.decode, self.batch_size = source, decode, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.shuffle_buffer, self.n_worker, self.epochs, self.drop_last = shuffle_buffer, n_worker, epochs, drop_last
        self.log = SkipLog() if log is None else log
        self._start = (0, 0)
        self._place = (0, 0)
        self._batches: Iterator[tuple[Batch, tuple[int, int]]] | None = None

    def __iter__(self) -> "Reader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._read()
        batch, self._place = next(self._batches)
        return batch

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads; a later `next` goes on after the last batch that was delivered."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]
        self._start, self._batches = self._place, None

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins: the epoch, and how many of this rank's raw samples are behind."""
        epoch, position = self._place
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where `state_dict` was taken, with the same batches as without a stop."""
        self.close()
        self._start = self._place = (state["epoch"], state["position"])

    def _read(self) -> Iterator[tuple[Batch, tuple[int, int]]]:
        raw = self._raw_samples(*self._start)
        n_ahead = AHEAD_PER_WORKER * self.n_worker + AHEAD_BATCHES * self.batch_size
        decoded = decode_ahead(raw, self._decode_one, self.n_worker, n_ahead)
        good = leave_out_bad(decoded, self.log, self._start)
        return batch_samples(good, self.batch_size, drop_last=self.drop_last)

    def _raw_samples(self, first_epoch: int, position: int) -> Iterator[Placed]:
        for epoch in count(first_epoch) if self.epochs is None else range(first_epoch, self.epochs):
            samples = shuffle(
                order_samples(self.source, self.seed, epoch, rank=self.rank, world_size=self.world_size, log=self.log),
                self.shuffle_buffer,
                np.random.default_rng([SHUFFLE_SEED, self.seed, epoch, self.rank]),
            )
            skip = position if epoch == first_epoch else 0
            n_seen = skip
            for sample in islice(samples, skip, None):
                yield Placed(epoch, n_seen, sample)
                n_seen += 1
            # A rank of many may have no sample in a single pass; an endless one would never return.
            if n_seen == 0 and (self.epochs is None or self.world_size == 1):
                raise InputError(f"{_name(self.source)}: no sample to read{_reasons(self.log)}")

    def _decode_one(self, placed: Placed) -> Placed:
        rng = np.random.default_rng([SAMPLE_SEED, self.seed, placed.epoch, self.rank, placed.position])
        try:
            return placed._replace(sample=self.decode(placed.sample, rng))
        except BadSample as error:
            return placed._replace(bad=str(error))


def training_reader(
    source: Source, decode: Decode, data: DataConfig, *, rank: int, world_size: int, seed: int, log: SkipLog
) -> Callable[[int], Reader]:
    """Micro-batch size -> a reader without end, shuffled and decoded as `data` says."""
    return functools.partial(
        Reader,
        source,
        decode,
        rank=rank,
        world_size=world_size,
        seed=seed,
        shuffle_buffer=data.shuffle_buffer,
        n_worker=data.n_worker,
        log=log,
    )


def order_samples(
    source: Source, seed: int, epoch: int, *, rank: int, world_size: int, log: SkipLog
) -> Iterator[Sample]:
    """This rank's samples of an epoch: the parts in an order drawn from (seed, epoch), divided over the ranks."""
    order = np.random.default_rng([PART_SEED, seed, epoch]).permutation(len(source.parts))
    parts = [source.parts[index] for index in order]
    if len(parts) >= world_size:
        for part in parts[rank::world_size]:
            yield from source.read(part, log)
    else:
        everything = (sample for part in parts for sample in source.read(part, log))
        yield from islice(everything, rank, None, world_size)


def shuffle(samples: Iterable[Sample], buffer_size: int, rng: np.random.Generator) -> Iterator[Sample]:
    """Yields `samples` in random order, out of a buffer of `buffer_size`; 1 leaves the order as it is."""
    if buffer_size == 1:
        yield from samples
        return
    buffer: list[Sample] = []
    for sample in samples:
        if len(buffer) < buffer_size:
            buffer.append(sample)
            continue
        place = int(rng.integers(buffer_size))
        yield buffer[place]
        buffer[place] = sample
    for place in rng.permutation(len(buffer)):
        yield buffer[place]


def decode_ahead(
    samples: Iterable[Placed], decode: Callable[[Placed], Placed], n_worker: int, n_ahead: int
) -> Iterator[Placed]:
    """Decodes in `n_worker` threads, in order, at most `n_ahead` samples ahead of the one that is yielded."""
    waiting: deque[Future[Placed]] = deque()
    workers = ThreadPoolExecutor(n_worker, thread_name_prefix="decode")
    try:
        for sample in samples:
            waiting.append(workers.submit(decode, sample))
            if len(waiting) > n_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        workers.shutdown(wait=True, cancel_futures=True)


def leave_out_bad(samples: Iterable[Placed], log: SkipLog, start: tuple[int, int] = (0, 0)) -> Iterator[Placed]:
    """Yields the good samples and logs the bad ones. Raises InputError when a whole epoch is bad.

    `start` is where the stream begins: the part of its epoch that lies before may have been good.
    """
    epoch, n_bad, n_good = start[0], 0, start[1]
    for placed in samples:
        if placed.epoch != epoch:
            _require_good(n_good, n_bad, log)
            epoch, n_bad, n_good = placed.epoch, 0, 0
        if placed.bad:
            n_bad += 1
            log.add(placed.sample.get("key", ""), placed.sample.get("origin", ""), placed.bad)
            continue
        n_good += 1
        yield placed
    _require_good(n_good, n_bad, log)


def batch_samples(
    samples: Iterable[Placed], batch_size: int, *, drop_last: bool
) -> Iterator[tuple[Batch, tuple[int, int]]]:
    """Yields batches, each with the place (epoch, samples behind) right after its last sample."""
    held: list[Placed] = []
    for placed in samples:
        held.append(placed)
        if len(held) == batch_size:
            yield collate([one.sample for one in held]), (placed.epoch, placed.position + 1)
            held = []
    if held and not drop_last:
        yield collate([one.sample for one in held]), (held[-1].epoch, held[-1].position + 1)


def collate(samples: list[dict[str, Any]]) -> Batch:
    """One dict of the fields: arrays are stacked, numbers become an array, all else a list."""
    batch: Batch = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        batch[name] = np.stack(values) if isinstance(first, (np.ndarray, np.number, int, float)) else values
    return batch


def _require_good(n_good: int, n_bad: int, log: SkipLog) -> None:
    if n_bad and not n_good:
        raise InputError(f"not one of {n_bad} samples can be used{_reasons(log)}")


def _name(source: Source) -> str:
    return source.parts[0].split("\0")[0] + (f" and {len(source.parts) - 1} more" if len(source.parts) > 1 else "")


def _reasons(log: SkipLog) -> str:
    return f": {log.summary()}" if log.n_skipped else ""
