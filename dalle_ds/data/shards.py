"""Webdataset tar shards: which ones a pattern names, how each scheme is opened, and the samples inside.

The format is webdataset's (members that share the name up to the first dot of the file name are one sample).
Python's tarfile reads it: webdataset's own reader imports torch, and takes a damaged header for the end of a shard.
"""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from braceexpand import braceexpand

from dalle_ds.config import InputError, ReadConfig
from dalle_ds.data.entry import ShardEntry
from dalle_ds.data.http import HttpStore
from dalle_ds.data.local import SUFFIX, LocalStore, local_path
from dalle_ds.data.refusals import check_header, refusal
from dalle_ds.data.retrying import retrying
from dalle_ds.data.s3 import S3Store
from dalle_ds.data.skips import BadSample
from dalle_ds.data.store import Store, Transient, Unreadable
from dalle_ds.data.stream import open_remote

__all__ = [
    "OPENERS",
    "SUFFIX",
    "BrokenShard",
    "UnreadableShard",
    "expand",
    "local_path",
    "open_stream",
    "read_shard",
    "sample_offsets",
    "scheme_of",
    "store_of",
]

SEPARATOR = "::"
CHUNK_BYTES = 2**24
REMEDY = "give a folder that holds .tar shards, one .tar, or a pattern such as train-{000..009}.tar"


class BrokenShard(BadSample):
    """A shard that ends early or is no tar; the samples before the fault are good."""


class UnreadableShard(BrokenShard):
    """A shard whose bytes cannot be had: gone, changed, damaged on the way, or behind a network that stays down."""


def expand(pattern: str) -> list[str]:
    """The shards that `pattern` names: a folder, a brace or `*` pattern, one file, or several joined by `::`.

    All of it also behind file:, s3:// (a prefix is a folder) and, but for folders and `*`, http(s)://.
    Raises InputError when nothing, or a local file that does not exist, is named.
    """
    shards = [shard for part in pattern.split(SEPARATOR) for shard in _expand_one(part.strip())]
    if not shards:
        raise InputError(f"no shards match {pattern!r}: {REMEDY}")
    return shards


def _expand_one(pattern: str) -> list[str]:
    if pattern and os.path.isdir(local_path(pattern)):
        return _find(pattern)
    try:
        names = list(braceexpand(pattern)) if pattern else []
    except ValueError:
        raise InputError(f"braces do not match in the shard pattern {pattern!r}: {REMEDY}") from None
    shards = []
    for name in names:
        if scheme_of(name) == "file":
            if os.path.isfile(local_path(name)):
                shards.append(name)
            elif "*" in name:
                shards.extend(_find(name))
            else:
                raise InputError(f"no shard {name!r} (from {pattern!r}): {REMEDY}")
        elif "*" in name or (scheme_of(name) == "s3" and SUFFIX not in name.rpartition("/")[2]):
            shards.extend(_find(name))
        else:
            shards.append(name)
    return shards


def _find(pattern: str) -> list[str]:
    config = ReadConfig()
    try:
        return retrying(config)(store_of(pattern, config).find, pattern)
    except (Transient, Unreadable) as error:
        raise InputError(str(error)) from error


def scheme_of(url: str) -> str:
    """`file` for a path, else what stands before `://`. Raises InputError for a scheme without an opener."""
    scheme, found, _ = url.partition("://")
    if not found:
        return "file"
    if scheme not in OPENERS:
        raise InputError(f"{url}: no way to open {scheme}://; known schemes are {', '.join(sorted(OPENERS))}")
    return scheme


def store_of(url: str, config: ReadConfig) -> Store:
    """Where `url` lies."""
    return OPENERS[scheme_of(url)](config)


def open_stream(
    url: str,
    begin: int = 0,
    end: int | None = None,
    entry: ShardEntry | None = None,
    config: ReadConfig | None = None,
) -> BinaryIO:
    """The bytes [begin, end) of a shard as a stream; close it.

    With the index's `entry` nothing is delivered that does not match it. An OSError names the shard.
    """
    if entry is None and end is None and scheme_of(url) == "file":
        file = open(local_path(url), "rb")  # noqa: SIM115
        file.seek(begin)
        return file
    config = config or ReadConfig()
    return open_remote(store_of(url, config), url, begin, end, entry, config)


def read_shard(
    url: str,
    begin: int = 0,
    entry: ShardEntry | None = None,
    *,
    end: int | None = None,
    config: ReadConfig | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the samples of a shard: `__key__`, `__url__`, and the bytes of each member under its extension.

    A sample with a member that is not to be read (see refusals.py) has the reason under `__refused__`.
    `begin` is the offset of a sample (of `entry`), `end` that of a later one, whose bytes are not asked for.
    Raises BrokenShard at a fault, after the samples before it; UnreadableShard where bytes cannot be had.
    """
    fault: BrokenShard | None = None
    samples = _group(_read_members(url, begin, end, entry, config or ReadConfig()), url)
    for sample in samples:
        if isinstance(sample, BrokenShard):
            fault = sample
        else:
            yield sample
    if fault is not None:
        raise fault


def sample_offsets(file: BinaryIO, *, stop_at_fault: bool = False) -> "array[int]":
    """The offset of the first header of each sample in a tar that is no more than that (not compressed).

    Raises BrokenShard when the tar is cut or damaged, unless `stop_at_fault`: then, the offsets before the fault.
    """
    offsets = array("Q")

    for sample in _group(_members(file, lambda member, _: member.offset), ""):
        if isinstance(sample, BrokenShard):
            if not stop_at_fault:
                raise sample
            break
        offsets.append(min(value for value in sample.values() if isinstance(value, int)))
    return offsets


def _group(members: Iterator[tuple[str, Any, str] | BrokenShard], url: str) -> Iterator[dict[str, Any] | BrokenShard]:
    """Samples out of members (name, content, refused); a fault comes last, after the sample that it may have cut."""
    sample: dict[str, Any] = {}
    fault: BrokenShard | None = None
    for member in members:
        if isinstance(member, BrokenShard):
            fault = member
            break
        name, content, refused = member
        folder, _, file_name = name.rpartition("/")
        stem, dot, extension = file_name.partition(".")
        if not refused and (not stem or not dot):
            continue
        # Names that begin with __ are the reader's own.
        key, extension = f"{folder}/{stem}" if folder else stem, extension.lower().lstrip("_")
        # A member that comes twice starts a sample of its own, rather than taking the place of the first.
        if sample and (sample["__key__"] != key or extension in sample):
            yield sample
            sample = {}
        if not sample:
            sample = {"__key__": key, "__url__": url}
        sample[extension] = content
        if refused:
            sample.setdefault("__refused__", refused)
    if sample:
        yield sample
    if fault is not None:
        yield fault


def _read_members(
    url: str, begin: int, end: int | None, entry: ShardEntry | None, config: ReadConfig
) -> Iterator[tuple[str, bytes, str] | BrokenShard]:
    try:
        with open_stream(url, begin, end, entry, config) as file:
            yield from _members(_decompressed(file), _content, ends_early=end is not None)
            # Behind the mark of its end a tar is padded; the checksum of the whole counts that too.
            while entry is not None and file.read(CHUNK_BYTES):
                pass
    except (Unreadable, FileNotFoundError) as error:
        yield UnreadableShard(str(error))


def _members(
    file: BinaryIO, take: Callable[[tarfile.TarInfo, "_Forward"], Any], ends_early: bool = False
) -> Iterator[tuple[str, Any, str] | BrokenShard]:
    """Name, `take`, and why it is refused (or "") of each member but folders, and the fault where there is one."""
    stream = _Forward(file, ends_early)
    try:
        with tarfile.TarFile(fileobj=cast(BinaryIO, stream), tarinfo=_Member) as archive:
            while (member := archive.next()) is not None:
                if not member.isdir():
                    yield member.name, take(member, stream), refusal(member)
                # tarfile keeps every header that it has read.
                archive.members = []  # type: ignore[attr-defined]
    except InputError:
        raise  # a wrong setting, not a damaged tar
    # tarfile raises the last three at headers that are made to confuse it.
    except (
        tarfile.TarError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        gzip.BadGzipFile,
        ValueError,
        IndexError,
        RecursionError,
    ) as error:
        hint = ", or compressed: index what is not" if stream.tell() <= tarfile.BLOCKSIZE else ""
        yield BrokenShard(f"the tar is truncated or damaged{hint} ({error})")


def _content(member: tarfile.TarInfo, stream: "_Forward") -> bytes:
    if refusal(member):
        return b""
    stream.seek(member.offset_data)
    content = stream.read(member.size)
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _decompressed(file: BinaryIO) -> BinaryIO:
    """`file`, or what it holds when it is compressed."""
    first = cast(io.BufferedReader, file).peek(max(map(len, COMPRESSIONS)))
    for magic, opened in COMPRESSIONS.items():
        if first.startswith(magic):
            return opened(file)
    return file


class _Forward:
    """A stream that knows its place and seeks by reading on, unless it can do better; all that tarfile needs."""

    def __init__(self, file: BinaryIO, ends_early: bool) -> None:
        self.file, self.place = file, 0
        self.seekable = file.seekable()
        # Where a range ends inside a shard, the mark of a tar's end stands in for what follows.
        self.mark = bytes(2 * tarfile.BLOCKSIZE) if ends_early else b""

    def tell(self) -> int:
        return self.place

    def seek(self, place: int) -> None:
        if self.seekable:
            try:
                self.file.seek(place - self.place, os.SEEK_CUR)
            except (OSError, OverflowError):
                raise tarfile.ReadError(f"a header points to byte {place:,}") from None
            self.place = place
        while self.place < place and self.read(min(place - self.place, CHUNK_BYTES)):
            pass

    def read(self, n_bytes: int) -> bytes:
        # In pieces: a damaged header may name any length.
        pieces = []
        while n_bytes > 0 and (piece := self.file.read(min(n_bytes, CHUNK_BYTES))):
            pieces.append(piece)
            n_bytes -= len(piece)
        content = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if n_bytes > 0 and self.mark:
            content, self.mark = content + self.mark[:n_bytes], self.mark[n_bytes:]
        self.place += len(content)
        return content


class _Member(tarfile.TarInfo):
    """A tar header; tarfile takes a damaged or missing one for the end of the archive, this one says so."""

    @classmethod
    def frombuf(cls, buf: "bytes | bytearray", encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        check_header(member)
        return member

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the mark at the end of a whole archive
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _gunzip(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


class _Bunzip(bz2.BZ2File):
    """bz2 says of damage that it is an OSError of no number; this one says EOFError, which no disk does."""

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(-1 if size is None else size)
        except OSError as error:
            if type(error) is OSError and error.errno is None:
                raise EOFError(str(error)) from error
            raise


def _bunzip(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, _Bunzip(file))


def _unxz(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, lzma.LZMAFile(file))


# Scheme -> the store that reads it.
OPENERS: dict[str, Callable[[ReadConfig], Store]] = {
    "file": LocalStore,
    "http": HttpStore,
    "https": HttpStore,
    "s3": S3Store,
}
COMPRESSIONS: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {b"\x1f\x8b": _gunzip, b"BZh": _bunzip, b"\xfd7zXZ": _unxz}
