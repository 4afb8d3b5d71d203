"""Mixtures: shares by weight, an epoch of its own for each set, lanes that ranks divide, and files that are wrong."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from data_sources import Ranks, numbers, source_of

from dalle_ds.config import InputError
from dalle_ds.data.mixture import MIN_SHARE, MixedOrder, Mixture, is_mixture, read_mixture
from dalle_ds.data.pipeline import Reader
from dalle_ds.data.sources import mixed_source, open_source
from dalle_ds.data.token_shards import TokenManifest, encode_codes, open_token_source, token_decode, write_manifest
from dalle_ds.data.writer import ShardWriter

SHUFFLED = {"shuffle_buffer": 64, "n_lanes": 8, "block_len": 8}


def write_mixture(path, entries):
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return str(path)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 3.0), (0.1, 0.2, 0.7), (1e-3, 1.0), (2.0, 2.0, 2.0, 1.5)], ids=str)
def test_every_set_has_its_share_and_its_draws_are_counted_without_gaps(weights):
    n, n_lanes = 60_000, 4
    mixture = Mixture(weights, seed=0, n_lanes=n_lanes)
    draws = defaultdict(list)
    for number in range(n):
        chosen, draw = mixture.draw(number)
        draws[chosen].append(draw)
    for chosen, weight in enumerate(weights):
        assert len(set(draws[chosen])) == len(draws[chosen])
        # A lane is off by its open cycle and a rounding.
        assert len(draws[chosen]) == pytest.approx(n * weight / sum(weights), abs=n_lanes * (2 + 64**0.5))
        # Lanes are not quite even; within a lane each draw follows the one before.
        for lane in range(n_lanes):
            mine = [draw for draw in draws[chosen] if draw % n_lanes == lane]
            assert mine == list(range(lane, lane + n_lanes * len(mine), n_lanes))


def test_shares_are_exact_in_the_long_run_and_are_spread():
    mixture = Mixture((1.0, 2.0), seed=1, n_lanes=1)
    sets = [mixture.draw(number)[0] for number in range(64 * 120)]
    assert Counter(sets) == {0: 2560, 1: 5120}
    assert all(0 < sum(sets[at : at + 30]) < 30 for at in range(0, len(sets), 30))


def test_each_set_keeps_its_own_epoch():
    order = MixedOrder([[300, 100], [250]], [3.0, 1.0], seed=0, **SHUFFLED)
    places = [order.place(number) for number in range(8_000)]
    assert [place.number for place in places] == list(range(8_000))
    seen = Counter((place.set, place.epoch, place.position) for place in places)
    assert set(seen.values()) == {1}
    for chosen, n in ((0, 400), (1, 250)):
        epochs = Counter(epoch for s, epoch, _ in seen if s == chosen)
        # All are complete but the last ones: lanes are not in step to the sample.
        assert all(epochs[epoch] == n for epoch in range(max(epochs) - 1))
        assert max(epochs) == pytest.approx(8_000 * (0.75, 0.25)[chosen] / n, abs=1)


def test_ranks_share_the_lanes_of_every_set():
    order = MixedOrder([[400], [300]], [1.0, 1.0], seed=0, **SHUFFLED)
    lanes = [
        {(place.set, place.window) for place in map(order.place, range(rank, 500, 4)) if place.epoch == 0}
        for rank in range(4)
    ]
    assert all(not (lanes[a] & lanes[b]) for a in range(4) for b in range(a))


@pytest.mark.parametrize("world_sizes", [(2, 4, 1, 3), (3, 1, 2)], ids=str)
def test_a_mixture_goes_on_with_any_number_of_ranks(world_sizes):
    source = mixed_source([source_of(40, 30), source_of(50, first=1000)], [1.0, 2.0])
    with Ranks(1, source, 12, seed=5, **SHUFFLED) as unbroken:
        expected = unbroken.steps(3 * len(world_sizes))
    found, state = [], None
    for world_size in world_sizes:
        with Ranks(world_size, source, 12 // world_size, seed=5, n_worker=2, **SHUFFLED) as ranks:
            if state is not None:
                ranks.load(state)
            found += ranks.steps(3)
            state = json.loads(json.dumps(ranks.state()))
    assert found == expected
    assert sum(n >= 1000 for n in numbers(found)) == pytest.approx(2 / 3 * len(found), rel=0.25)


def test_in_the_order_of_the_files_a_mixture_is_one_set_after_the_other():
    source = mixed_source([source_of(3, 2), source_of(4, first=10)], [1.0, 5.0])
    with Ranks(1, source, 9, epochs=1) as ranks:
        assert numbers(ranks.step()) == [0, 1, 2, 3, 4, 10, 11, 12, 13]


def test_a_mixture_of_other_weights_is_refused_on_resume():
    sources = [source_of(9), source_of(9, first=10)]
    with Ranks(1, mixed_source(sources, [1.0, 1.0]), 2, **SHUFFLED) as ranks:
        state = ranks.state()
    with (
        Ranks(1, mixed_source(sources, [1.0, 2.0]), 2, **SHUFFLED) as ranks,
        pytest.raises(InputError, match=r"weights was \[1\.0, 1\.0\] and is \[1\.0, 2\.0\]"),
    ):
        ranks.load(state)


def test_a_file_names_sets_beside_itself(tmp_path):
    for name in ("photos", "drawings"):
        with ShardWriter(tmp_path / name, 10) as writer:
            writer.write({"png": b"p", "txt": name.encode()})
    entries = [{"data": "photos", "weight": 2}, {"data": str(tmp_path / "drawings"), "weight": 0.5}]
    data = write_mixture(tmp_path / "mixture.json", entries)
    assert is_mixture(data)
    assert not is_mixture(str(tmp_path))
    source = open_source(data)
    assert source.sets == ((1, 2.0), (1, 0.5))
    assert source.part_lens == [1, 1]
    assert [sample["caption"] for part in source.parts for sample in source.read(part)] == ["photos", "drawings"]
    urls = [{"data": "s3://bucket/a.tar::b/{0..3}.tar", "weight": 1}]
    [entry] = read_mixture(write_mixture(tmp_path / "urls.json", urls))
    assert entry.data == f"s3://bucket/a.tar::{tmp_path}/b/{{0..3}}.tar"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "does not parse"),
        ("[]", "no list of sets"),
        ('{"data": "a"}', "no list of sets"),
        ('[{"data": "a"}]', 'set 1 .* must have "data" and "weight"'),
        ('[{"data": "a", "weight": 1, "wait": 2}]', "set 1"),
        ('[{"data": "", "weight": 1}]', "must name a folder"),
        ('[{"data": "other.json", "weight": 1}]', "must name a folder"),
        ('[{"data": "a", "weight": 1}, {"data": "a", "weight": 0}]', "set 2 .* weight 0 must be a number above 0"),
        ('[{"data": "a", "weight": true}]', "weight True"),
        ('[{"data": "a", "weight": NaN}]', "weight nan"),
    ],
)
def test_files_that_are_wrong_are_refused_in_one_line(tmp_path, content, words):
    with pytest.raises(InputError, match=words) as error:
        read_mixture(write_mixture(tmp_path / "mixture.json", content))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_share_that_is_hardly_seen_are_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_mixture(str(tmp_path / "mixture.json"))
    with pytest.raises(InputError, match=r"smallest share of the mixture is 5.0e-05"):
        Mixture((1.0, MIN_SHARE / 2), seed=0, n_lanes=1)


def test_token_shards_are_mixed_when_one_dvae_made_them(tmp_path):
    for name, n in (("a", 4), ("b", 6)):
        with ShardWriter(tmp_path / name, 3) as writer:
            for index in range(n):
                writer.write({"npy": encode_codes(np.full((2, 2), index)), "txt": name.encode()})
        write_manifest(
            tmp_path / name, TokenManifest(n_samples=n, grid_size=2, vocab_size=9, dvae="d", dvae_sha256="1")
        )
    entries = [{"data": "a", "weight": 1}, {"data": "b", "weight": 3}]
    data = write_mixture(tmp_path / "mixture.json", entries)
    source, manifest = open_token_source(data)
    assert (manifest.n_samples, source.part_lens) == (10, [3, 1, 3, 3])
    with Reader(source, token_decode(manifest), 80, **SHUFFLED) as reader:
        assert Counter(next(reader)["caption"])["b"] == pytest.approx(60, abs=15)
    write_manifest(tmp_path / "b", TokenManifest(n_samples=6, grid_size=2, vocab_size=9, dvae="d", dvae_sha256="2"))
    with pytest.raises(InputError, match="another dVAE"):
        open_token_source(data)
