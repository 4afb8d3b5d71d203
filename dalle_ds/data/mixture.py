"""Several sets of samples as one stream without end: which set each position draws from, by weight.

A mixture is a JSON file, [{"data": "a folder or shards", "weight": 2.0}, ...]. The weights are shares of the samples
drawn, whatever the sizes of the sets, and each set runs through epochs of its own. Every lane (see order.py) draws by
itself, from the same lane of each set, so that a rank still reads the lanes of its own alone.
"""

import json
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from dalle_ds.config import InputError, require
from dalle_ds.data.order import MIXTURE_SEED, Order, Window
from dalle_ds.data.shards import SEPARATOR

SUFFIX = ".json"
REMEDY = 'give a list such as [{"data": "photos", "weight": 2.0}, {"data": "drawings", "weight": 1.0}]'
# Samples of a lane after which each set has had its share, to within one; more where a share is small.
CYCLE_LEN = 64
# Below this a cycle gets long, and the set is hardly seen.
MIN_SHARE = 1e-4


class Weighted(NamedTuple):
    """A set of a mixture, and its weight."""

    data: str
    weight: float


class Place(NamedTuple):
    """Position `number` of the stream: a position of an epoch of one set, and where that lies."""

    number: int
    set: int
    epoch: int
    position: int
    window: Window
    offset: int


class Mixture:
    """Which set each position of the stream draws from, and how many draws from that set come before."""

    def __init__(self, weights: Sequence[float], *, seed: int, n_lanes: int) -> None:
        self.seed, self.n_lanes, self.n_sets = seed, n_lanes, len(weights)
        # Whole numbers: shares stay exact over any number of samples.
        fractions = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(fraction.denominator for fraction in fractions))
        self._ends = np.cumsum([0, *(int(fraction * scale) for fraction in fractions)]).tolist()
        smallest = min(fractions) / sum(fractions)
        require(
            smallest >= MIN_SHARE, f"the smallest share of the mixture is {float(smallest):.1e}: leave that set out"
        )
        # With two draws a cycle, rounding never takes back what the cycle before has given.
        self.cycle_len = max(CYCLE_LEN, math.ceil(2 / smallest))
        self._cycle = lru_cache(2 * n_lanes)(self._make_cycle)

    def draw(self, number: int) -> tuple[int, int]:
        """The set of position `number`, and the number of the draw in that set's own endless stream."""
        if self.n_sets == 1:
            return 0, number
        row, lane = divmod(number, self.n_lanes)
        cycle, index = divmod(row, self.cycle_len)
        sets, n_before = self._cycle(lane, cycle)
        chosen = int(sets[index])
        return chosen, (self._n_drawn(chosen, cycle) + int(n_before[index])) * self.n_lanes + lane

    def _n_drawn(self, chosen: int, cycle: int) -> int:
        """Draws of a lane from a set before the cycle: the set's share, rounded so that all sets add up."""
        begin, end = (cycle * self.cycle_len * bound // self._ends[-1] for bound in self._ends[chosen : chosen + 2])
        return int(end - begin)

    def _make_cycle(self, lane: int, cycle: int) -> tuple[Any, Any]:
        """The sets that the lane draws from in the cycle, and at each the draws from the same set before it."""
        counts = [self._n_drawn(s, cycle + 1) - self._n_drawn(s, cycle) for s in range(self.n_sets)]
        sets = np.repeat(np.arange(self.n_sets, dtype=np.int32), counts)
        sets = np.random.default_rng([MIXTURE_SEED, self.seed, lane, cycle]).permutation(sets)
        n_before = np.empty(self.cycle_len, np.int32)
        for chosen, count in enumerate(counts):
            n_before[sets == chosen] = np.arange(count)
        return sets, n_before


class MixedOrder:
    """Where each position of an endless stream over one set or several lies.

    part_lens: of each set, the numbers of samples of its parts; weights: one a set.
    """

    def __init__(
        self,
        part_lens: Sequence[Sequence[int]],
        weights: Sequence[float],
        *,
        seed: int,
        shuffle_buffer: int,
        n_lanes: int,
        block_len: int,
    ) -> None:
        cut = {"shuffle_buffer": shuffle_buffer, "n_lanes": n_lanes, "block_len": block_len}
        self.orders = [Order(lens, seed=(seed, number), **cut) for number, lens in enumerate(part_lens)]
        self.mixture = Mixture(weights, seed=seed, n_lanes=n_lanes)
        self.n_samples = sum(order.n_samples for order in self.orders)
        self.window_len = max(order.window_len for order in self.orders)
        self.n_lanes = n_lanes if len(weights) > 1 else self.orders[0].n_lanes

    def place(self, number: int) -> Place:
        """Where position `number` (from 0, without end) lies."""
        chosen, draw = self.mixture.draw(number)
        order = self.orders[chosen]
        epoch, position = divmod(draw, order.n_samples)
        return Place(number, chosen, epoch, position, *order.locate(epoch, position))


def is_mixture(data: str) -> bool:
    """Whether `data` names a mixture file."""
    return data.endswith(SUFFIX)


def read_mixture(path: str) -> list[Weighted]:
    """The sets and weights in a mixture file; its relative paths start at its own folder. Raises InputError."""
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}: {REMEDY}") from None
    except ValueError as error:
        raise InputError(f"{path}: the mixture does not parse ({error}): {REMEDY}") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: the mixture is no list of sets: {REMEDY}")
    return [_read_entry(path, number, entry) for number, entry in enumerate(entries, start=1)]


def _read_entry(path: str, number: int, entry: Any) -> Weighted:
    where = f"{path}: set {number} of the mixture"
    if not isinstance(entry, dict) or set(entry) != {"data", "weight"}:
        raise InputError(f'{where} must have "data" and "weight" and nothing else: {REMEDY}')
    data, weight = entry["data"], entry["weight"]
    if not isinstance(data, str) or not data or is_mixture(data):
        raise InputError(f'{where}: "data" {data!r} must name a folder or shards: {REMEDY}')
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    require(is_number and 0 < weight < math.inf, f"{where}: weight {weight!r} must be a number above 0")
    parts = [part.strip() for part in data.split(SEPARATOR)]
    parts = [part if "://" in part else os.path.join(os.path.dirname(path), part) for part in parts]
    return Weighted(SEPARATOR.join(parts), float(weight))
