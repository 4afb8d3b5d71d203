"""Webdataset tar shards: which ones a pattern names, how each scheme is opened, and the samples inside.

The format is webdataset's (members that share the name up to the first dot of the file name are one sample).
Python's tarfile reads it: webdataset's own reader imports torch, and takes a damaged header for the end of a shard.
"""

import glob
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from braceexpand import braceexpand

from dalle_ds.config import InputError
from dalle_ds.data.skips import BadSample

SEPARATOR = "::"
SUFFIX = ".tar"
REMEDY = "give a folder that holds .tar shards, one .tar, or a pattern such as train-{000..009}.tar"


class BrokenShard(BadSample):
    """A shard that ends early or is no tar; the samples before the fault are good."""


def expand(pattern: str) -> list[str]:
    """The shards that `pattern` names: a folder, a brace or `*` pattern, one file, or several joined by `::`.

    Raises InputError when nothing, or a file that does not exist, is named.
    """
    shards = [shard for part in pattern.split(SEPARATOR) for shard in _expand_one(part.strip())]
    if not shards:
        raise InputError(f"no shards match {pattern!r}: {REMEDY}")
    return shards


def _expand_one(pattern: str) -> list[str]:
    if pattern and os.path.isdir(pattern):
        # A leading dot marks a shard that is still being written.
        return sorted(glob.glob(os.path.join(glob.escape(pattern), f"*{SUFFIX}")))
    try:
        names = list(braceexpand(pattern)) if pattern else []
    except ValueError:
        raise InputError(f"braces do not match in the shard pattern {pattern!r}: {REMEDY}") from None
    shards = []
    for name in names:
        if scheme_of(name) != "file" or os.path.isfile(local_path(name)):
            shards.append(name)
        elif "*" in name:
            shards.extend(sorted(glob.glob(local_path(name))))
        else:
            raise InputError(f"no shard {name!r} (from {pattern!r}): {REMEDY}")
    return shards


def scheme_of(url: str) -> str:
    """`file` for a path, else what stands before `://`. Raises InputError for a scheme without an opener."""
    scheme, found, _ = url.partition("://")
    if not found:
        return "file"
    if scheme not in OPENERS:
        raise InputError(f"{url}: no way to open {scheme}://; known schemes are {', '.join(sorted(OPENERS))}")
    return scheme


def local_path(url: str) -> str:
    return url.removeprefix("file://")


def read_shard(url: str) -> Iterator[dict[str, Any]]:
    """Yields the samples of a shard: `__key__`, `__url__`, and the bytes of each member under its extension.

    Raises BrokenShard at a fault, after the samples before it.
    """
    sample: dict[str, Any] = {}
    fault: BrokenShard | None = None
    members = _read_members(url)
    while True:
        try:
            name, content = next(members)
        except StopIteration:
            break
        except BrokenShard as error:
            fault = error
            break
        folder, _, file_name = name.rpartition("/")
        stem, dot, extension = file_name.partition(".")
        if not stem or not dot:
            continue
        key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
        # A member that comes twice starts a sample of its own, rather than taking the place of the first.
        if sample and (sample["__key__"] != key or extension in sample):
            yield sample
            sample = {}
        if not sample:
            sample = {"__key__": key, "__url__": url}
        sample[extension] = content
    if sample:
        yield sample
    if fault is not None:
        raise fault


def _read_members(url: str) -> Iterator[tuple[str, bytes]]:
    with OPENERS[scheme_of(url)](url) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as archive:
                while (member := archive.next()) is not None:
                    if member.isreg():
                        content = archive.extractfile(member)
                        assert content is not None
                        yield member.name, content.read()
                    # In stream mode tarfile keeps every header it has read.
                    archive.members = []  # type: ignore[attr-defined]
        except (tarfile.TarError, EOFError) as error:
            raise BrokenShard(f"the tar is truncated or damaged ({error})") from error


class _Member(tarfile.TarInfo):
    """A tar header; tarfile takes a damaged or missing one for the end of the archive, this one says so."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the mark at the end of a whole archive
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def open_file(url: str) -> BinaryIO:
    return open(local_path(url), "rb")


# Scheme -> function from url to a binary stream.
OPENERS: dict[str, Callable[[str], BinaryIO]] = {"file": open_file}
