"""The order of one set of samples: a pure function of (seed, epoch) and of how many samples each part holds.

Every epoch the set is cut into blocks of neighbours, the blocks are permuted over all parts, and the row that they make
is cut into `n_lanes` lanes of equal length (to within one). A lane is shuffled in windows; position p of the epoch is
the next sample of lane p mod n_lanes. So any position is found without those before it, a rank that takes every
world_size-th position reads few lanes from end to end (its own alone, when world_size divides n_lanes), and a batch
draws on as many places of the data as there are lanes. Ranks and workers do not enter.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from dalle_ds.config import require

# First numbers of the seeds, so that no two uses draw the same numbers.
BLOCK_SEED, WINDOW_SEED, MIXTURE_SEED, SAMPLE_SEED, STAND_IN_SEED = range(5)
# A set is cut into at least this many blocks, where it holds as many samples: small data are shuffled through and
# through, and large ones are read in blocks of block_len.
MIN_BLOCKS = 4096

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Window(NamedTuple):
    """What is read at once: window `number` of a lane in an epoch."""

    epoch: int
    lane: int
    number: int


class Piece(NamedTuple):
    """Samples `begin` to `end` of the part of that number."""

    part: int
    begin: int
    end: int


class Order:
    """Where each position of each epoch lies, of parts that hold `part_lens` samples.

    `shuffle_buffer` samples, over all lanes, are shuffled together; 1 leaves the samples in the order of the parts.
    """

    def __init__(
        self, part_lens: Sequence[int], *, seed: Sequence[int], shuffle_buffer: int, n_lanes: int, block_len: int
    ) -> None:
        for name, value in (("shuffle_buffer", shuffle_buffer), ("n_lanes", n_lanes), ("block_len", block_len)):
            require(value >= 1, f"{name} {value} must be at least 1")
        self.seed = tuple(seed)
        self.n_samples = sum(part_lens)
        self.is_shuffled = shuffle_buffer > 1
        self.n_lanes = max(1, min(n_lanes, self.n_samples)) if self.is_shuffled else 1
        self.window_len = -(-shuffle_buffer // self.n_lanes) if self.is_shuffled else block_len
        block = max(1, min(block_len, self.n_samples // MIN_BLOCKS)) if self.is_shuffled else block_len
        lens = np.asarray(part_lens, dtype=np.int64)
        n_blocks = -(-lens // block)
        self._part: Numbers = np.repeat(np.arange(len(lens)), n_blocks)
        first_blocks = np.repeat(np.cumsum(n_blocks) - n_blocks, n_blocks)
        self._begin: Numbers = (np.arange(len(self._part)) - first_blocks) * block
        self._len: Numbers = np.minimum(block, lens[self._part] - self._begin)
        # What is under way: this epoch and the next, and two windows of each lane.
        self._row = lru_cache(2)(self._make_row)
        self._permutation = lru_cache(2 * self.n_lanes)(self._make_permutation)

    def locate(self, epoch: int, position: int) -> tuple[Window, int]:
        """The window that holds the position, and its index among the samples of `pieces(window)`."""
        place, lane = divmod(position, self.n_lanes)
        number, index = divmod(place, self.window_len)
        window = Window(epoch, lane, number)
        return window, int(self._permutation(window)[index]) if self.is_shuffled else index

    def pieces(self, window: Window) -> list[Piece]:
        """What to read for a window, in this order."""
        blocks, ends = self._row(window.epoch)
        at, last = self._bounds(window)
        pieces: list[Piece] = []
        number = int(np.searchsorted(ends, at, side="right"))
        while at < last:
            block = blocks[number]
            skipped = at - (int(ends[number]) - int(self._len[block]))
            n = min(int(ends[number]), last) - at
            begin = int(self._begin[block]) + skipped
            if pieces and (pieces[-1].part, pieces[-1].end) == (self._part[block], begin):
                pieces[-1] = pieces[-1]._replace(end=begin + n)
            else:
                pieces.append(Piece(int(self._part[block]), begin, begin + n))
            at, number = at + n, number + 1
        return pieces

    def find(self, epoch: int, position: int) -> Piece:
        """The one sample at the position."""
        window, index = self.locate(epoch, position)
        for piece in self.pieces(window):
            if index < piece.end - piece.begin:
                return piece._replace(begin=piece.begin + index, end=piece.begin + index + 1)
            index -= piece.end - piece.begin
        raise AssertionError(f"position {position} lies behind its window")

    def _bounds(self, window: Window) -> tuple[int, int]:
        """Where a window begins and ends in the row of permuted blocks."""
        shortest, n_longer = divmod(self.n_samples, self.n_lanes)
        lane_begin = window.lane * shortest + min(window.lane, n_longer)
        lane_end = lane_begin + shortest + (window.lane < n_longer)
        begin = lane_begin + window.number * self.window_len
        return begin, min(begin + self.window_len, lane_end)

    def _make_row(self, epoch: int) -> tuple[Numbers, Numbers]:
        """The blocks in the order of the epoch, and where each ends."""
        n_blocks = len(self._part)
        if self.is_shuffled:
            blocks: Numbers = np.random.default_rng([BLOCK_SEED, *self.seed, epoch]).permutation(n_blocks)
        else:
            blocks = np.arange(n_blocks)
        return blocks, np.cumsum(self._len[blocks])

    def _make_permutation(self, window: Window) -> Numbers:
        begin, end = self._bounds(window)
        return np.random.default_rng([WINDOW_SEED, *self.seed, *window]).permutation(end - begin)


def fingerprint(part_lens: Sequence[int]) -> str:
    """Tells data of other parts apart, by how many samples each holds."""
    return hashlib.sha256(np.asarray(part_lens, dtype="<i8").tobytes()).hexdigest()[:16]
