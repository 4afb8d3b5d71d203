"""The index of shards: index.jsonl beside them, one line a shard with its counts, offsets and checksums.

With it a reader seeks to a sample, and notices a shard that was cut, changed or damaged on the way. `dalle-ds index`
writes it.
"""

import functools
import hashlib
import io
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, TypeVar, cast

from dalle_ds.config import InputError, ReadConfig
from dalle_ds.data.entry import BLOCK_BYTES, ShardEntry, format_entry, parse_entry
from dalle_ds.data.retrying import retrying
from dalle_ds.data.shards import BrokenShard, open_stream, sample_offsets, scheme_of, store_of
from dalle_ds.data.store import Stat, Transient, Unreadable

__all__ = ["INDEX", "ShardEntry", "find_entries", "index_shards", "make_entry", "read_index", "write_index"]

INDEX = "index.jsonl"
READ_BYTES = 2**20
T = TypeVar("T")


def read_index(urls: Sequence[str], config: ReadConfig | None = None) -> dict[str, ShardEntry]:
    """The entry of each shard.

    A local shard without one is scanned (its headers alone, so without checksums). Raises InputError for a remote
    shard without an entry, and for an index that does not parse.
    """
    config = config or ReadConfig()
    by_folder = {folder: _read_one(folder, config) for folder in dict.fromkeys(map(_folder, urls))}
    entries = {}
    for url in urls:
        folder, name = _folder(url), _name(url)
        found = by_folder[folder].get(name)
        if found is None and scheme_of(url) != "file":
            raise InputError(f"{url}: not in {_beside(folder)}: run dalle-ds index on the shards first")
        entries[url] = _scan(url, config) if found is None else found
    return entries


def find_entries(urls: Sequence[str], config: ReadConfig | None = None) -> dict[str, ShardEntry]:
    """The entries that the indexes beside the shards hold; a shard without one is left out. Raises InputError."""
    config = config or ReadConfig()
    by_folder = {folder: _read_one(folder, config) for folder in dict.fromkeys(map(_folder, urls))}
    return {url: by_folder[_folder(url)][_name(url)] for url in urls if _name(url) in by_folder[_folder(url)]}


def index_shards(
    urls: Sequence[str], config: ReadConfig | None = None, n_worker: int = 1, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[str, ShardEntry | str, bool]]:
    """Yields (url, its entry or what is wrong with the shard, whether it was read), in order.

    A shard whose length and etag (locally: time of change) are those of the index beside it is not read again.
    """
    config = config or ReadConfig()
    by_folder = {folder: _read_one(folder, config) for folder in dict.fromkeys(map(_folder, urls))}

    def index_one(url: str) -> tuple[str, ShardEntry | str, bool]:
        try:
            known = by_folder[_folder(url)].get(_name(url))
            if known is not None and known.sha256 and _version(url, config) == _known_version(known):
                return url, known, False
            return url, make_entry(url, config, block_bytes), True
        except (BrokenShard, OSError) as error:
            return url, str(error), True

    workers = ThreadPoolExecutor(n_worker, thread_name_prefix="index")
    try:
        yield from workers.map(index_one, urls)
    finally:
        workers.shutdown(wait=True, cancel_futures=True)


def make_entry(url: str, config: ReadConfig | None = None, block_bytes: int = BLOCK_BYTES) -> ShardEntry:
    """Reads the whole shard. Raises BrokenShard when it is cut or damaged, OSError when it cannot be read."""
    config = config or ReadConfig()
    before = _call(config, functools.partial(store_of(url, config).stat, url))
    entries: list[ShardEntry] = []
    # Bytes that do not give the MD5 that the store names went wrong on the way, unless they come the same twice.
    while len(entries) < 2 or entries[-1].sha256 != entries[-2].sha256:
        with Digests(open_stream(url, config=config), block_bytes) as file:
            offsets = sample_offsets(cast(BinaryIO, file))
            while file.read(READ_BYTES):
                pass
        if file.n_bytes != before.n_bytes or _version(url, config) != (before.n_bytes, before.etag, before.mtime_ns):
            raise Unreadable(f"{url}: the shard changes while it is indexed")
        entries.append(_entry(url, before, offsets, file.sha256.hexdigest(), file.crc32, block_bytes))
        if before.md5 in (None, file.md5.hexdigest()):
            break
        if len(entries) == config.n_attempt:
            raise Unreadable(f"{url}: read {len(entries)} times, and never the same bytes twice")
    return entries[-1]


def write_index(entries: Iterable[tuple[str, ShardEntry]], config: ReadConfig | None = None) -> list[str]:
    """Writes (url, entry) pairs into the index beside the shards, as a whole or not at all; what is there stays.

    Returns where it wrote. Raises InputError where nothing can be written.
    """
    config = config or ReadConfig()
    by_folder: dict[str, dict[str, ShardEntry]] = {}
    for url, entry in entries:
        by_folder.setdefault(_folder(url), {})[entry.name] = entry
    for folder, added in by_folder.items():
        merged = _read_one(folder, config) | added
        content = "".join(f"{format_entry(merged[name])}\n" for name in sorted(merged)).encode()
        place = _beside(folder)
        store = store_of(place, config)
        _settled(config, functools.partial(store.write_small, place, content))
    return [_beside(folder) for folder in by_folder]


class Digests(io.RawIOBase):
    """Passes a stream through, and keeps its length, SHA-256, MD5 and the CRC-32 of every block."""

    def __init__(self, file: BinaryIO, block_bytes: int) -> None:
        self.file, self.block_bytes = file, block_bytes
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self.n_bytes = 0
        self.crc32 = array("L")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        n_read: int = self.file.readinto(buffer)  # type: ignore[attr-defined]
        view = memoryview(buffer)[:n_read]
        self.sha256.update(view)
        self.md5.update(view)
        while view:
            n_left = self.block_bytes - self.n_bytes % self.block_bytes
            if n_left == self.block_bytes:
                self.crc32.append(0)
            self.crc32[-1] = zlib.crc32(view[:n_left], self.crc32[-1])
            self.n_bytes += len(view[:n_left])
            view = view[n_left:]
        return n_read

    def close(self) -> None:
        self.file.close()
        super().close()


def _scan(url: str, config: ReadConfig) -> ShardEntry:
    """The entry of a local shard from its headers, seeking over the bytes; what lies behind a fault is left out."""
    try:
        with open_stream(url, config=config) as file:
            offsets = sample_offsets(file, stop_at_fault=True)
        return _entry(url, store_of(url, config).stat(url), offsets)
    except OSError as error:
        raise InputError(str(error)) from error


def _entry(
    url: str,
    state: Stat,
    offsets: Sequence[int],
    sha256: str = "",
    crc32: Sequence[int] = (),
    block_bytes: int = BLOCK_BYTES,
) -> ShardEntry:
    return ShardEntry(
        _name(url), state.n_bytes, sha256, state.etag, array("Q", offsets), crc32, block_bytes, state.mtime_ns
    )


def _version(url: str, config: ReadConfig) -> tuple[int, str | None, int | None]:
    store = store_of(url, config)
    state = _call(config, lambda: store.stat(url))
    return state.n_bytes, state.etag, state.mtime_ns


def _known_version(entry: ShardEntry) -> tuple[int, str | None, int | None]:
    return entry.n_bytes, entry.etag, entry.mtime_ns


def _read_one(folder: str, config: ReadConfig) -> dict[str, ShardEntry]:
    place = _beside(folder)
    store = store_of(place, config)
    content = _settled(config, lambda: store.read_small(place)) or b""
    entries = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entry = parse_entry(line)
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"{place}, line {number}: {error}: remove the file and run dalle-ds index again") from None
        entries[entry.name] = entry
    return entries


def _call(config: ReadConfig, function: Callable[[], T]) -> T:
    return retrying(config)(function)


def _settled(config: ReadConfig, function: Callable[[], T]) -> T:
    """As _call, for what must not fail."""
    try:
        return _call(config, function)
    except (Transient, Unreadable) as error:
        raise InputError(str(error)) from error


def _folder(url: str) -> str:
    return url.rpartition("/")[0] if scheme_of(url) != "file" else os.path.dirname(url)


def _name(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]


def _beside(folder: str) -> str:
    return f"{folder}/{INDEX}" if folder else INDEX
