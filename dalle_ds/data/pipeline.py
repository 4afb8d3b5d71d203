"""From a source to batches: addressed by (epoch, position), read and decoded ahead in threads, resumed anywhere.

order.py and mixture.py say what lies at each position of an endless stream; the ranks take turns in it, so that
micro-batch k of all ranks together holds positions k G to (k + 1) G. What was delivered is therefore one number,
whatever the number of ranks and threads. Stages are generators, each from iterator to iterator (the shape of
webdataset's): fetch_ahead -> decode_ahead -> batch_samples.
"""

import functools
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from dalle_ds.config import DataConfig, InputError, require
from dalle_ds.data.mixture import MixedOrder, Place
from dalle_ds.data.order import SAMPLE_SEED, STAND_IN_SEED, Window, fingerprint
from dalle_ds.data.skips import BadSample, SkipLog
from dalle_ds.data.sources import Sample, Source

Batch = dict[str, Any]
State = dict[str, Any]
In = TypeVar("In")
Out = TypeVar("Out")
K = TypeVar("K", bound=Hashable)

# Samples that wait, decoded or being decoded, beyond the batch under way: a thread's worth, and a batch's.
AHEAD_PER_WORKER, AHEAD_BATCHES = 4, 1
# Threads that wait for bytes; they do little else.
N_READING = 2
# Samples tried in the place of a bad one before the data are given up: with half of them bad, one run in 2^100 ends so.
N_STAND_INS = 100
SHORT = "the shard ends before this sample"
LONG = "not in the index of the shard: it is of another shard, or the shard is compressed"
EMPTY = "the shard holds no sample"


class Decode(Protocol):
    """Turns a sample into the fields of a batch, or raises BadSample; `rng` is the sample's own."""

    def __call__(self, sample: Sample, rng: np.random.Generator, /) -> dict[str, Any]: ...


class Placed(NamedTuple):
    """A place, and the decoded sample in it; None where it is left out."""

    place: Place
    sample: dict[str, Any] | None


class Reader:
    """Batches of a source: without end, or `epochs` times over it.

    The stream is a pure function of source, seed, shuffle_buffer, n_lanes and block_len; each rank takes every
    world_size-th sample of it, and its batches run on from one epoch into the next. A sample that cannot be used goes
    to `log`. Without end its place is filled by another sample, drawn by (seed, epoch, position) alone, so that all
    ranks have as many steps: as many samples come twice in the epoch as are bad. With `epochs` it is left out, and the
    last batch is smaller (or dropped, `drop_last`). Raises InputError when there is nothing to read, or nothing good.
    Close it, or use it in a `with` statement, to stop its threads.
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
        n_lanes: int = 1,
        block_len: int = 64,
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
        self.n_worker, self.epochs, self.drop_last = n_worker, epochs, drop_last
        self.log = SkipLog() if log is None else log
        self._log_lock, self._stop = threading.Lock(), threading.Event()
        # In the order of the files, a mixture is one set after the other.
        sets = source.sets if shuffle_buffer > 1 else ()
        part_lens, weights, self._first_parts = divide_sets(source, sets)
        cut = {"shuffle_buffer": shuffle_buffer, "n_lanes": n_lanes, "block_len": block_len}
        for number, part_len in enumerate(source.part_lens):
            if not part_len:
                self._load_piece(number, 0, 0)  # says why
        if not all(map(sum, part_lens)):
            raise InputError(f"{_name(source)}: no sample to read{_reasons(self.log)}")
        self.order = MixedOrder(part_lens, weights, seed=seed, **cut)
        self._described = {"seed": seed, **cut, "weights": weights, "n_samples": self.order.n_samples}
        self._described["parts"] = fingerprint(source.part_lens)
        self._start = self._at = 0
        self._batches: Generator[tuple[Batch, int], None, None] | None = None

    def __iter__(self) -> "Reader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._read()
        batch, self._at = next(self._batches)
        return batch

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads; a later `next` goes on after the last batch that was delivered."""
        if self._batches is not None:
            self._batches.close()
        self._start, self._batches = self._at, None

    def state_dict(self) -> State:
        """Where the next batch begins, the same on every rank: the epoch, and the samples of it that all ranks had.

        "order" is what the order depends on. (Of a mixture, an epoch is as many samples as all sets hold together.)
        """
        epoch, position = divmod(self._at, self.order.n_samples)
        return {"epoch": epoch, "position": position, "order": self._described}

    def load_state_dict(self, state: State) -> None:
        """Goes on where `state_dict` was taken, by any of any number of ranks. Raises InputError for other data."""
        was = state["order"]
        differing = [
            f"{key} was {was.get(key)} and is {value}"
            for key, value in self._described.items()
            if was.get(key) != value
        ]
        if differing:
            raise InputError(
                f"{_name(self.source)}: the data or their order are not those that the run has read so far "
                f"({'; '.join(differing)}): go on with the ones it had, or choose another --out"
            )
        self.close()
        self._start = self._at = state["epoch"] * self.order.n_samples + state["position"]

    def _read(self) -> Generator[tuple[Batch, int], None, None]:
        self._stop.clear()
        # As far as a window of each lane reaches: the next windows are read while these are used.
        n_fetched = -(-self.order.window_len * self.order.n_lanes // self.world_size)
        n_decoded = AHEAD_PER_WORKER * self.n_worker + AHEAD_BATCHES * self.batch_size
        with (
            closing(fetch_ahead(self._places(), self._key, self._load, N_READING, n_fetched)) as raw,
            closing(decode_ahead(raw, self._decode_one, self.n_worker, n_decoded)) as decoded,
            _set_at_exit(self._stop),
        ):
            good = leave_out_bad(decoded, self.log)
            for batch, last in batch_samples(good, self.batch_size, drop_last=self.drop_last):
                yield batch, last.number - self.rank + self.world_size

    def _places(self) -> Iterator[Place]:
        first, step = self._start + self.rank, self.world_size
        end = None if self.epochs is None else self.epochs * self.order.n_samples
        return map(self.order.place, count(first, step) if end is None else range(first, end, step))

    def _key(self, place: Place) -> tuple[tuple[int, int], tuple[int, Window]]:
        """The lane (of a set) that a place belongs to, along all epochs, and the window."""
        return (place.set, place.number % self.order.n_lanes), (place.set, place.window)

    def _load(self, key: tuple[int, Window]) -> list[Sample | None]:
        """The slots of a window, in the order in which they are stored."""
        chosen, window = key
        slots: list[Sample | None] = []
        for piece in self.order.orders[chosen].pieces(window):
            slots += self._load_piece(self._first_parts[chosen] + piece.part, piece.begin, piece.end)
        return slots

    def _load_piece(self, number: int, begin: int, end: int) -> list[Sample]:
        part = self.source.parts[number]
        # To the end of the part, where it is to be read up to its last slot: damage at the end is found there.
        is_last = end == self.source.part_lens[number]
        slots: list[Sample] = []
        with closing(self.source.read_slots(part, begin, None if is_last else end)) as read:
            for slot in read:
                slots.append(slot)
                if self._stop.is_set() or len(slots) > end - begin:
                    break
        for extra in slots[end - begin :]:
            self._leave_out(extra, extra.get("bad", LONG))
        if is_last and not (slots or end):
            self._leave_out({"origin": part}, EMPTY)
        missing = {"key": "", "origin": part, "bad": SHORT}
        return (slots + [missing] * (end - begin))[: end - begin]

    def _decode_one(self, raw: tuple[Place, Sample]) -> Placed:
        place, slot = raw
        address = (self.seed, place.set, place.epoch, place.position)
        try:
            return Placed(place, self._decode_slot(slot, [SAMPLE_SEED, *address]))
        except BadSample as error:
            self._leave_out(slot, str(error))
        return Placed(place, None if self.epochs is not None else self._stand_in(place, address))

    def _stand_in(self, place: Place, address: tuple[int, ...]) -> dict[str, Any]:
        """Another sample of the same epoch and set, decoded. Raises InputError when they are bad one and all."""
        order = self.order.orders[place.set]
        drawn = np.random.default_rng([STAND_IN_SEED, *address])
        positions = drawn.choice(order.n_samples, min(order.n_samples, N_STAND_INS), replace=False)
        for position in positions.tolist():
            piece = order.find(place.epoch, position)
            [slot] = self._load_piece(self._first_parts[place.set] + piece.part, piece.begin, piece.end)
            try:
                return self._decode_slot(slot, [SAMPLE_SEED, *address])
            except BadSample as error:
                self._leave_out(slot, str(error))
        raise InputError(f"not one of {len(positions)} samples can be used{_reasons(self.log)}")

    def _decode_slot(self, slot: Sample, seed: list[int]) -> dict[str, Any]:
        if "bad" in slot:
            raise BadSample(slot["bad"])
        return self.decode(slot, np.random.default_rng(seed))

    def _leave_out(self, slot: Sample, reason: str) -> None:
        with self._log_lock:
            self.log.add(slot.get("key", ""), slot.get("origin", ""), reason)


def training_reader(
    source: Source, decode: Decode, data: DataConfig, *, rank: int, world_size: int, seed: int, log: SkipLog
) -> Callable[[int], Reader]:
    """Micro-batch size -> a reader without end, shuffled and decoded as `data` says."""
    if rank == 0 and data.n_lanes % world_size:
        warnings.warn(
            f"--data.n_lanes {data.n_lanes} is no multiple of the {world_size} processes: several read each shard; "
            "choose a multiple when a run begins",
            stacklevel=2,
        )
    return functools.partial(
        Reader,
        source,
        decode,
        rank=rank,
        world_size=world_size,
        seed=seed,
        shuffle_buffer=data.shuffle_buffer,
        n_lanes=data.n_lanes,
        block_len=data.block_len,
        n_worker=data.n_worker,
        log=log,
    )


def divide_sets(source: Source, sets: tuple[tuple[int, float], ...]) -> tuple[list[list[int]], list[float], list[int]]:
    """Of each set: the samples in its parts, its weight, and the number of its first part; all is one set without."""
    sets = sets or ((len(source.parts), 1.0),)
    ends = np.cumsum([n_parts for n_parts, _ in sets]).tolist()
    firsts = [0, *ends[:-1]]
    part_lens = [source.part_lens[first:end] for first, end in zip(firsts, ends, strict=True)]
    return part_lens, [weight for _, weight in sets], firsts


def fetch_ahead(
    places: Iterable[Place],
    key: Callable[[Place], tuple[Hashable, K]],
    load: Callable[[K], list[Sample | None]],
    n_thread: int,
    n_ahead: int,
) -> Generator[tuple[Place, Sample], None, None]:
    """Yields the sample of each place; what the next `n_ahead` places need is loaded in `n_thread` threads meanwhile.

    `key` gives the lane of a place, and what to load. Within a lane one load follows the other, so that the one before
    is dropped when the next is used: a lane holds two, and a few more between mixed sets.
    """
    waiting: deque[Place] = deque()
    loads: dict[K, Future[list[Sample | None]]] = {}
    in_use: dict[Hashable, K] = {}
    with stopping(ThreadPoolExecutor(n_thread, thread_name_prefix="read")) as readers:

        def take(place: Place) -> tuple[Place, Sample]:
            lane, wanted = key(place)
            if in_use.get(lane, wanted) != wanted:
                loads.pop(in_use[lane], None)
            in_use[lane] = wanted
            if wanted not in loads:
                loads[wanted] = readers.submit(load, wanted)
            slots = loads[wanted].result()
            sample, slots[place.offset] = slots[place.offset], None
            if sample is None:
                raise AssertionError(f"{place} was taken before")
            return place, sample

        for place in places:
            _, wanted = key(place)
            if wanted not in loads:
                loads[wanted] = readers.submit(load, wanted)
            waiting.append(place)
            if len(waiting) > n_ahead:
                yield take(waiting.popleft())
        while waiting:
            yield take(waiting.popleft())


def decode_ahead(
    samples: Iterable[In], decode: Callable[[In], Out], n_worker: int, n_ahead: int
) -> Generator[Out, None, None]:
    """Decodes in `n_worker` threads, in order, at most `n_ahead` samples ahead of the one that is yielded."""
    waiting: deque[Future[Out]] = deque()
    with stopping(ThreadPoolExecutor(n_worker, thread_name_prefix="decode")) as workers:
        for sample in samples:
            waiting.append(workers.submit(decode, sample))
            if len(waiting) > n_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _set_at_exit(event: threading.Event) -> Iterator[None]:
    try:
        yield
    finally:
        event.set()


@contextmanager
def stopping(workers: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Ends the threads with what they are at, and none of what still waits, however the block is left."""
    try:
        yield workers
    finally:
        workers.shutdown(wait=True, cancel_futures=True)


def leave_out_bad(samples: Iterable[Placed], log: SkipLog) -> Iterator[Placed]:
    """Yields what has a sample. Raises InputError at the end when nothing had."""
    n_bad, n_good = 0, 0
    for placed in samples:
        n_bad += placed.sample is None
        n_good += placed.sample is not None
        if placed.sample is not None:
            yield placed
    if n_bad and not n_good:
        raise InputError(f"not one of {n_bad} samples can be used{_reasons(log)}")


def batch_samples(samples: Iterable[Placed], batch_size: int, *, drop_last: bool) -> Iterator[tuple[Batch, Place]]:
    """Yields batches, each with the place of its last sample."""
    held: list[dict[str, Any]] = []
    place = None
    for place, sample in samples:
        assert sample is not None
        held.append(sample)
        if len(held) == batch_size:
            yield collate(held), place
            held = []
    if held and place is not None and not drop_last:
        yield collate(held), place


def collate(samples: list[dict[str, Any]]) -> Batch:
    """One dict of the fields: arrays are stacked, numbers become an array, all else a list."""
    batch: Batch = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        batch[name] = np.stack(values) if isinstance(first, (np.ndarray, np.number, int, float)) else values
    return batch


def _name(source: Source) -> str:
    return source.parts[0].split("\0")[0] + (f" and {len(source.parts) - 1} more" if len(source.parts) > 1 else "")


def _reasons(log: SkipLog) -> str:
    return f": {log.summary()}" if log.n_skipped else ""
