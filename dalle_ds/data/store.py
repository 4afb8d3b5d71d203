"""Where shards lie: what every scheme (a local disk, http, S3) can do, and how a failure is told.

A store answers ranged reads; stream.py makes a stream out of them. A new scheme is one class and one line in
shards.OPENERS.
"""

from typing import NamedTuple, Protocol


class Transient(OSError):
    """A failure that another try may mend: a broken connection, a stall, a server that asks to slow down."""


class Unreadable(OSError):
    """A failure that is final for one shard: it is gone, forbidden, changed, or no number of tries mended it."""


class Stat(NamedTuple):
    """Length of a shard in bytes; `etag`, equal as long as the shard is the same; its MD5 (hex) where that is known.

    On a local disk the time of its last change stands for the etag.
    """

    n_bytes: int
    etag: str | None
    md5: str | None = None
    mtime_ns: int | None = None


class Body(Protocol):
    """The bytes of one ranged read."""

    def read(self, n_bytes: int, /) -> bytes:
        """At most `n_bytes`, and none at the end."""

    def close(self) -> None:
        """Gives up what is left."""

    def shutdown(self) -> None:
        """Wakes another thread that waits in `read`."""


class Store(Protocol):
    """One scheme. Every method raises Transient or Unreadable for the shard, InputError for a wrong setting."""

    def stat(self, url: str) -> Stat: ...

    def read_range(self, url: str, begin: int, end: int, expected: Stat) -> Body:
        """Bytes [begin, end) of the version `expected`: a shard that has changed since is Unreadable."""

    def find(self, pattern: str) -> list[str]:
        """The shards of a folder, or those that a pattern with `*` matches, in order."""

    def read_small(self, url: str) -> bytes | None:
        """A whole small file, or None when there is none."""

    def write_small(self, url: str, content: bytes) -> None:
        """Puts a small file in place, as a whole or not at all."""


def changed(url: str) -> Unreadable:
    return Unreadable(f"{url}: the shard has changed since it was indexed or opened: run dalle-ds index again")


def check_range(url: str, header: str | None, begin: int, end: int, expected: Stat) -> None:
    """Raises unless Content-Range says that bytes [begin, end) of a shard of the expected length follow."""
    if header is None:
        raise Unreadable(
            f"{url}: the server does not answer ranged requests: serve the shards with one that does, or from S3"
        )
    span, _, total = header.removeprefix("bytes").strip().partition("/")
    if total != "*" and total != str(expected.n_bytes):
        raise changed(url)
    if span != f"{begin}-{end - 1}":
        raise Transient(f"asked for bytes {begin}-{end - 1}, the server sends {span}")
