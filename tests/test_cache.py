"""The cache of parts: bounded, shared by processes, and never trusted."""

import io
import multiprocessing
import os
import random
import tarfile
from pathlib import Path

import pytest

from dalle_ds.config import ReadConfig
from dalle_ds.data import stream
from dalle_ds.data.cache import PartCache
from dalle_ds.data.index import make_entry
from dalle_ds.data.local import LocalStore
from dalle_ds.data.store import Unreadable
from dalle_ds.data.stream import open_remote


def held(folder):
    return {path.name: path.stat().st_size for path in Path(folder).iterdir() if not path.name.startswith(".")}


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    cache = PartCache(tmp_path, 1000)
    for number in range(6):
        cache.put(f"part{number}", bytes(100))
        os.utime(tmp_path / f"part{number}", (number, number))
    assert cache.get("part0") == bytes(100)  # used now
    cache.put("big", bytes(120))
    cache.shrink(400)
    assert sum(held(tmp_path).values()) + 400 <= 1000
    assert "part0" in held(tmp_path)
    assert "part1" not in held(tmp_path)
    assert cache.get("part1") is None


def test_a_part_that_does_not_fit_and_a_full_disk_are_no_error(tmp_path, monkeypatch):
    cache = PartCache(tmp_path, 1000)
    cache.put("huge", bytes(900))
    assert held(tmp_path) == {}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache.put("part", b"1")
    assert held(tmp_path) == {}


def fill(folder, seed, n_bytes):
    """What a process does: puts and gets parts whose content their name tells; returns the wrong ones."""
    rng, cache, wrong = random.Random(seed), PartCache(folder, n_bytes), 0
    for _ in range(300):
        number = rng.randrange(100)
        content = cache.get(f"part{number}")
        if content is None:
            cache.put(f"part{number}", bytes([number]) * 2000)
        elif content != bytes([number]) * 2000:
            wrong += 1
    return wrong


def test_many_processes_share_it_within_its_bound(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        wrong = pool.starmap(fill, [(tmp_path, seed, 64_000) for seed in range(3)])
    assert wrong == [0, 0, 0]
    assert 0 < sum(held(tmp_path).values()) <= 64_000


class CountingStore(LocalStore):
    n_read = 0

    def read_range(self, url, begin, end, expected):
        self.n_read += 1
        return super().read_range(url, begin, end, expected)


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "0.tar"
    content = random.Random(0).randbytes(20_000)
    with tarfile.open(path, "w") as archive:
        for index in range(4):
            member = tarfile.TarInfo(f"{index}.png")
            member.size = 5000
            archive.addfile(member, io.BytesIO(content[5000 * index : 5000 * (index + 1)]))
    return path


def read(store, path, entry, config, begin=0, end=None):
    with open_remote(store, str(path), begin, end, entry, config) as file:
        return file.read()


def test_a_shard_is_read_from_the_cache_the_second_time(shard, tmp_path):
    config = ReadConfig(part_bytes=8192, cache=str(tmp_path / "cache"), cache_bytes=10**6)
    entry, store = make_entry(str(shard), block_bytes=1024), CountingStore(config)
    whole = shard.read_bytes()
    assert read(store, shard, entry, config) == whole
    n_read = store.n_read
    assert n_read == 1
    assert len(held(tmp_path / "cache")) == -(-len(whole) // 8192)
    assert read(store, shard, entry, config) == whole
    assert read(store, shard, entry, config, 3000, 9999) == whole[3000:9999]
    assert store.n_read == n_read


def test_damage_in_the_cache_is_read_anew_from_the_source(shard, tmp_path):
    config = ReadConfig(part_bytes=8192, cache=str(tmp_path / "cache"), cache_bytes=10**6)
    entry, store = make_entry(str(shard), block_bytes=1024), CountingStore(config)
    read(store, shard, entry, config)
    for path in (tmp_path / "cache").glob("[!.]*"):
        path.write_bytes(bytes(path.stat().st_size))
    assert read(store, shard, entry, config) == shard.read_bytes()


def test_only_bytes_that_were_checked_enter(shard, tmp_path):
    config = ReadConfig(
        part_bytes=8192, n_attempt=2, backoff_seconds=0, cache=str(tmp_path / "cache"), cache_bytes=10**6
    )
    entry = make_entry(str(shard), block_bytes=1024)
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Unreadable, match=r"0\.tar.*CRC-32"):
        read(CountingStore(config), shard, entry, config)
    assert not any(name.endswith("-0-8192") for name in held(tmp_path / "cache"))
    # Without an index there is nothing to check against, and nothing is kept.
    store = LocalStore(config)
    assert stream.Fetcher(store, str(shard), store.stat(str(shard)), None, config, 100).cache is None
