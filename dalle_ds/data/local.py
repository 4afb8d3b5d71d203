"""Shards on a local or mounted disk: paths, and file:// URLs."""

import errno
import glob
import os
import urllib.parse
from pathlib import Path
from typing import BinaryIO

from dalle_ds.config import InputError, ReadConfig
from dalle_ds.data.store import Stat, Unreadable, changed

SUFFIX = ".tar"


def local_path(url: str) -> str:
    """The path that a path or a file: URL names."""
    if not url.startswith("file:"):
        return url
    return urllib.parse.unquote(url.removeprefix("file:").removeprefix("//"))


class LocalStore:
    """Shards on a disk; a shard has no etag, so its length is what tells that it has changed."""

    def __init__(self, config: ReadConfig) -> None:
        self.config = config

    def stat(self, url: str) -> Stat:
        try:
            state = os.stat(local_path(url))
        except OSError as error:
            raise Unreadable(f"{url}: {error.strerror}") from error
        return Stat(state.st_size, None, mtime_ns=state.st_mtime_ns)

    def read_range(self, url: str, begin: int, end: int, expected: Stat) -> "_LocalBody":
        if self.stat(url).n_bytes != expected.n_bytes:
            raise changed(url)
        try:
            file = open(local_path(url), "rb")  # noqa: SIM115
            file.seek(begin)
        except OSError as error:
            raise Unreadable(f"{url}: {error.strerror}") from error
        return _LocalBody(url, file, end - begin)

    def find(self, pattern: str) -> list[str]:
        path = local_path(pattern)
        # A leading dot marks a shard that is still being written; neither `*` matches it.
        return sorted(glob.glob(os.path.join(glob.escape(path), f"*{SUFFIX}") if os.path.isdir(path) else path))

    def read_small(self, url: str) -> bytes | None:
        try:
            return Path(local_path(url)).read_bytes()
        except FileNotFoundError:
            return None

    def write_small(self, url: str, content: bytes) -> None:
        path = Path(local_path(url))
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EROFS):
                raise InputError(f"{url}: cannot be written ({error.strerror})") from None
            raise
        finally:
            partial.unlink(missing_ok=True)


class _LocalBody:
    def __init__(self, url: str, file: BinaryIO, n_left: int) -> None:
        self.url, self.file, self.n_left = url, file, n_left

    def read(self, n_bytes: int, /) -> bytes:
        try:
            content = self.file.read(min(n_bytes, self.n_left))
        except OSError as error:
            raise Unreadable(f"{self.url}: {error.strerror}") from error
        self.n_left -= len(content)
        return content

    def close(self) -> None:
        self.file.close()

    def shutdown(self) -> None:
        pass
