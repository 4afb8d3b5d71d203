"""The order of a set: every sample once an epoch, whatever the parts, shuffled, and found without those before."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from dalle_ds.config import InputError
from dalle_ds.data.order import Order, fingerprint

CASES = [
    ((5, 1, 8, 3, 3), 6, 64, 256),
    ((20,), 6, 2, 3),
    ((1000, 2000, 7), 50, 8, 16),
    ((0, 3, 0), 5, 4, 2),
    ((1,) * 40, 10, 7, 4),
    ((9, 4), 1, 3, 4),
    ((1_000, 1), 70, 3, 2),
]


def order_of(part_lens=(300, 500), seed=0, shuffle_buffer=100, n_lanes=4, block_len=16):
    return Order(part_lens, seed=(seed,), shuffle_buffer=shuffle_buffer, n_lanes=n_lanes, block_len=block_len)


def epoch_of(order, epoch=0):
    """(part, sample) of each position."""
    found = [order.find(epoch, position) for position in range(order.n_samples)]
    assert all(piece.end == piece.begin + 1 for piece in found)
    return [(piece.part, piece.begin) for piece in found]


@pytest.mark.parametrize(("part_lens", "shuffle_buffer", "n_lanes", "block_len"), CASES, ids=str)
def test_every_sample_is_at_one_position_of_each_epoch(part_lens, shuffle_buffer, n_lanes, block_len):
    order = order_of(part_lens, 0, shuffle_buffer, n_lanes, block_len)
    everything = Counter((part, index) for part, n in enumerate(part_lens) for index in range(n))
    for epoch in (0, 3):
        assert Counter(epoch_of(order, epoch)) == everything


def test_the_order_is_a_function_of_seed_and_epoch():
    orders = {(seed, epoch): epoch_of(order_of(seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert epoch_of(order_of(seed=1), 1) == orders[1, 1]
    assert len({tuple(order) for order in orders.values()}) == 4


def test_a_shuffle_buffer_of_one_keeps_the_order_of_the_parts():
    order = order_of((3, 0, 2), shuffle_buffer=1, n_lanes=64, block_len=2)
    assert epoch_of(order, 5) == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]


def test_windows_are_read_in_few_pieces_and_no_sample_of_a_lane_comes_twice():
    order = order_of((30_000, 40_000), shuffle_buffer=4_000, n_lanes=8, block_len=100)
    seen, n_pieces = Counter(), 0
    windows = {order.locate(0, position)[0] for position in range(order.n_samples)}
    for window in windows:
        pieces = order.pieces(window)
        n_pieces += len(pieces)
        assert sum(piece.end - piece.begin for piece in pieces) <= order.window_len == 500
        seen.update((piece.part, index) for piece in pieces for index in range(piece.begin, piece.end))
    assert set(seen.values()) == {1}
    assert len(seen) == order.n_samples
    # Blocks of 17 (70,000 // 4096), and the cuts that windows add.
    assert n_pieces <= 70_000 // 17 + 2 + 2 * len(windows)


def test_neighbours_are_shuffled_apart_over_the_whole_set():
    """Random samples lie a third of the set apart, on average, and an order that was cut into few pieces would not."""
    order = order_of((250,) * 40, shuffle_buffer=800, n_lanes=16, block_len=64)
    at = np.array([part * 250 + index for part, index in epoch_of(order)])
    # 10,000 draws: the mean distance of neighbours is within 1% of a third; lanes are ordered, hence 5%.
    assert np.abs(np.diff(at)).mean() == pytest.approx(10_000 / 3, rel=0.05)
    # A batch of 64 draws on the whole set too: half of it from each half, to within 5 standard deviations of 4.
    halves = (at[: 64 * 150].reshape(150, 64) < 5_000).sum(1)
    assert abs(halves - 32).max() <= 20
    assert abs(np.corrcoef(at, np.arange(len(at)))[0, 1]) < 0.1
    # Where a sample comes has nothing to do with where it came in the epoch before.
    places = [np.argsort([part * 250 + index for part, index in epoch_of(order, epoch)]) for epoch in (0, 1)]
    assert abs(np.corrcoef(*places)[0, 1]) < 0.1


def test_small_sets_are_shuffled_through_and_through():
    order = order_of((60,), shuffle_buffer=8_192, n_lanes=64, block_len=256)
    at = [index for _, index in epoch_of(order)]
    assert sum(abs(a - b) == 1 for a, b in pairwise(at)) < 10


def test_a_position_far_into_250_million_samples_is_found_alone():
    order = order_of((10_000,) * 25_000, shuffle_buffer=8_192, n_lanes=64, block_len=256)
    [piece] = {order.find(7, 249_999_999) for _ in range(2)}
    assert 0 <= piece.part < 25_000


@pytest.mark.parametrize("name", ["shuffle_buffer", "n_lanes", "block_len"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(InputError, match=f"{name} 0"):
        order_of(**{name: 0})


def test_a_fingerprint_tells_other_parts_apart():
    assert fingerprint([3, 4]) == fingerprint((3, 4)) != fingerprint([4, 3])
