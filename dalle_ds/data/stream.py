"""A shard as a stream of bytes: ranged requests by a thread ahead of the reader, each resumed where it broke.

No byte is handed out that was not checked: the length always, the version by its etag, and with an index entry the
CRC-32 of every block before the block is read, so that wrong bytes are asked for again rather than delivered.
"""

import contextlib
import functools
import hashlib
import http.client
import io
import random
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar, cast

from tenacity import retry_if_exception_type
from urllib3.exceptions import HTTPError

from dalle_ds.config import ReadConfig
from dalle_ds.data.cache import PartCache
from dalle_ds.data.entry import ShardEntry
from dalle_ds.data.retrying import retrying
from dalle_ds.data.store import Body, Stat, Store, Transient, Unreadable

CHUNK_BYTES = 2**20  # what a broken connection may cost
PEEK_BYTES = 64
T = TypeVar("T")


class WrongBytes(Transient):
    """A part that is not what the index says."""


def open_remote(
    store: Store, url: str, begin: int, end: int | None, entry: ShardEntry | None, config: ReadConfig
) -> BinaryIO:
    """The bytes [begin, end) of a shard as a stream; an OSError (Unreadable) of `read` names the shard."""
    if entry is None or entry.etag is None:
        expected = _retried(config, threading.Event(), url, functools.partial(store.stat, url))
        if entry is not None and expected.n_bytes != entry.n_bytes:
            raise Unreadable(f"{url}: {expected.n_bytes} bytes, the index says {entry.n_bytes}: index it again")
    else:
        expected = Stat(entry.n_bytes, entry.etag)
    end = expected.n_bytes if end is None else min(end, expected.n_bytes)
    fetcher = Fetcher(store, url, expected, entry if entry is not None and entry.crc32 else None, config, end)
    # Without checksums of blocks, that of the whole, when all of it is read.
    whole = entry is not None and not entry.crc32 and begin == 0 and end == entry.n_bytes
    sha256 = entry.sha256 if entry is not None and whole else ""
    return cast(BinaryIO, ShardStream(fetcher, begin, end, sha256))


class Fetcher:
    """Gets parts of one version of one shard, from its store or the cache, and checks them; for one thread.

    A request goes on over many parts, and the next part is read from where it stands.
    """

    def __init__(
        self, store: Store, url: str, expected: Stat, entry: ShardEntry | None, config: ReadConfig, end: int
    ) -> None:
        self.store, self.url, self.expected, self.entry, self.config = store, url, expected, entry, config
        self.stopped = threading.Event()
        # Parts begin where blocks do; those of the cache on a grid, so that each is met again.
        self.grain = 1 if entry is None else entry.block_bytes
        self.part_bytes = max(1, config.part_bytes // self.grain) * self.grain
        self.cache: PartCache | None = None
        if config.cache and entry is not None:
            self.cache = PartCache(config.cache, config.cache_bytes)
            self.grain = self.part_bytes
        self.end = min(-(-end // self.grain) * self.grain, expected.n_bytes)
        self._body: Body | None = None
        self._place, self._body_end = 0, 0

    def parts(self, begin: int) -> Iterator[bytes]:
        """The parts from `begin` rounded down to the grain on; each is whole and checked.

        Raises Unreadable when no number of tries gets one.
        """
        begin = begin // self.grain * self.grain
        while begin < self.end:
            # The first part may begin off the grid; the ones after it lie on it.
            end = min((begin // self.part_bytes + 1) * self.part_bytes, self.end)
            yield self._fetch(begin, end)
            begin = end

    def stop(self) -> None:
        """Ends what is under way in another thread."""
        self.stopped.set()
        # One that has just ended has no socket left.
        with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
            self._body.shutdown()  # type: ignore[union-attr]

    def close(self) -> None:
        """Gives up the request under way."""
        if self._body is not None:
            self._body.close()  # of no effect on a connection whose answer was read to its end
            self._body = None

    def _fetch(self, begin: int, end: int) -> bytes:
        name = "" if self.entry is None else f"{self.entry.sha256}-{begin}-{end}"
        held = None if self.cache is None else self.cache.get(name)
        if held is not None and self._wrong(held, begin, end) is None:
            return held
        tries = retrying(self.config, self.stopped).copy(retry=retry_if_exception_type(WrongBytes))
        try:
            content = tries(self._read_checked, begin, end)
        except WrongBytes as error:
            raise Unreadable(f"{self.url}: {error}, {self.config.n_attempt} times") from error
        if self.cache is not None:
            self.cache.put(name, content)
        return content

    def _read_checked(self, begin: int, end: int) -> bytes:
        chunks: list[bytes] = []
        n_got = 0

        def go_on() -> None:
            nonlocal n_got
            before = n_got
            try:
                while begin + n_got < end:
                    chunks.append(self._read_chunk(begin + n_got, min(CHUNK_BYTES, end - begin - n_got)))
                    n_got += len(chunks[-1])
            except Transient:
                if n_got == before:
                    raise

        while begin + n_got < end:
            _retried(self.config, self.stopped, self.url, go_on)
            if begin + n_got < end:  # broken, but not in vain: the tries are counted anew
                self.stopped.wait(random.uniform(0, self.config.backoff_seconds))
        content = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        wrong = self._wrong(content, begin, end)
        if wrong is not None:
            self.close()
            raise WrongBytes(f"the bytes from {wrong} on are not those that were indexed (CRC-32)")
        return content

    def _read_chunk(self, place: int, n_bytes: int) -> bytes:
        """At least one byte at `place`, at most `n_bytes`; every failure of the network is Transient."""
        if self.stopped.is_set():
            raise Unreadable(f"{self.url}: closed")
        if self._body is None or self._place != place:
            self.close()
            self._place, self._body_end = place, min(place + self.config.request_bytes, self.end)
            self._body = self.store.read_range(self.url, place, self._body_end, self.expected)
        try:
            chunk = self._body.read(min(n_bytes, self._body_end - place))
        except (HTTPError, http.client.HTTPException, OSError) as error:
            self.close()
            if isinstance(error, Unreadable):
                raise
            raise Transient(f"{type(error).__name__}: {error}") from error
        self._place += len(chunk)
        if not chunk or self._place == self._body_end:
            self.close()
        if not chunk:
            raise Transient(f"the answer ended at byte {place} of {self._body_end}")
        return chunk

    def _wrong(self, content: bytes, begin: int, end: int) -> int | None:
        """The place of the first block that differs from the index, or None."""
        if len(content) != end - begin:
            return begin
        if self.entry is None:
            return None
        view, size = memoryview(content), self.entry.block_bytes
        for start in range(0, len(content), size):
            if zlib.crc32(view[start : start + size]) != self.entry.crc32[(begin + start) // size]:
                return begin + start
        return None


class ShardStream(io.RawIOBase):
    """Bytes [begin, end) in order, `n_ahead` parts ahead of the reader at most; close it to stop its thread."""

    def __init__(self, fetcher: Fetcher, begin: int, end: int, sha256: str = "") -> None:
        self.fetcher, self.sha256 = fetcher, sha256
        self._digest = hashlib.sha256() if sha256 else None
        self._skip = begin % fetcher.grain
        self._n_left = max(0, end - begin)
        self._part = memoryview(b"")
        self._ready: deque[bytes | BaseException] = deque()
        self._turn = threading.Condition()
        self._failed: BaseException | None = None
        if self._n_left:
            # A daemon: one that waits for a server's first answer cannot be woken, and must not hold up the end.
            threading.Thread(target=self._read_ahead, args=(begin,), name="shard", daemon=True).start()

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """`size` bytes, fewer only at the end; all that is left without one."""
        n_wanted = self._n_left if size is None or size < 0 else min(size, self._n_left)
        pieces = []
        while n_wanted:
            pieces.append(bytes(self._some(n_wanted)))
            n_wanted -= len(pieces[-1])
        self._check_failed()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        some = self._some(len(buffer))
        memoryview(buffer)[: len(some)] = some
        self._check_failed()
        return len(some)

    def peek(self, _: int = 0, /) -> bytes:
        """Some of the bytes that come next, none at the end; they are read again."""
        if self._n_left and not self._part:
            self._part = self._take()
        return bytes(self._part[: min(PEEK_BYTES, self._n_left)])

    def _some(self, n_bytes: int) -> memoryview:
        """The next bytes, at most `n_bytes`, none at the end."""
        self._check_failed()
        if self._n_left and not self._part:
            self._part = self._take()
        some = self._part[: min(n_bytes, self._n_left)]
        self._part = self._part[len(some) :]
        self._n_left -= len(some)
        if not self._n_left and self._digest is not None and self._digest.hexdigest() != self.sha256:
            self._failed = Unreadable(f"{self.fetcher.url}: the bytes are not those that were indexed (SHA-256)")
        return some

    def _check_failed(self) -> None:
        if self.closed:
            raise ValueError("read of a closed shard")
        if self._failed is not None:
            raise self._failed  # a reader that goes on must not get the bytes behind the gap

    def close(self) -> None:
        if not self.closed:
            self.fetcher.stop()
            with self._turn:
                self._turn.notify_all()
        super().close()

    def _take(self) -> memoryview:
        with self._turn:
            self._turn.wait_for(lambda: bool(self._ready))
            content = self._ready.popleft()
            self._turn.notify_all()
        if isinstance(content, BaseException):
            self._failed = content
            raise content
        part = memoryview(content)[self._skip :]
        self._skip = 0
        if self._digest is not None:
            self._digest.update(part)
        return part

    def _read_ahead(self, begin: int) -> None:
        stopped = self.fetcher.stopped
        try:
            for part in self.fetcher.parts(begin):
                with self._turn:
                    self._turn.wait_for(lambda: len(self._ready) < self.fetcher.config.n_ahead or stopped.is_set())
                    if stopped.is_set():
                        return
                    self._ready.append(part)
                    self._turn.notify_all()
        except BaseException as error:
            with self._turn:
                self._ready.append(error)
                self._turn.notify_all()
        finally:
            self.fetcher.close()


def _retried(config: ReadConfig, stopped: threading.Event, url: str, function: Callable[[], T]) -> T:
    try:
        return retrying(config, stopped)(function)
    except Transient as error:
        raise Unreadable(f"{url}: {error} ({config.n_attempt} tries)") from error
