"""Writes samples as webdataset tar shards, named as img2dataset names them: 00000.tar holds 000000000.png, .txt, .json.

A shard is written aside as `.00000.tar.partial` and renamed when it is complete, so that a reader never meets half a
shard. The same samples make the same bytes: no times, no owners.
"""

import contextlib
import io
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from dalle_ds.config import FULL_DISK, InputError, require
from dalle_ds.data.index import INDEX

MAX_SAMPLES_PER_SHARD = 10_000  # a key is 5 digits of shard and 4 of index
PARTIAL = ".{}.tar.partial"


def write_shard(folder: str | Path, shard: int, samples: Iterable[Mapping[str, bytes]]) -> Path:
    """Writes one shard with all of `samples` (extension -> bytes) and returns its path.

    Raises InputError when the disk is full. On any exception nothing is left behind.
    """
    with _Shard(Path(folder), shard) as file:
        for index, sample in enumerate(samples):
            file.add(format_key(shard, index), sample)
    return file.path


def format_key(shard: int, index: int) -> str:
    """The key of a sample: shard number (5 digits) and index in the shard (4 digits)."""
    return f"{shard:05d}{index:04d}"


class ShardWriter:
    """Writes samples one after the other into shards of `samples_per_shard`; a context manager.

    Raises InputError when `folder` already holds shards, unless `overwrite`: then all of them are removed when the
    writer is entered. Also when the disk is full. On an exception the unfinished shard is removed.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int, overwrite: bool = False) -> None:
        require(
            1 <= samples_per_shard <= MAX_SAMPLES_PER_SHARD,
            f"samples_per_shard {samples_per_shard} must lie in [1, {MAX_SAMPLES_PER_SHARD}]: keys have 4 digits",
        )
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.overwrite = overwrite
        self.n_shard = 0  # shards complete
        self.n_sample = 0
        self._open: _Shard | None = None
        self._made_folder = False

    def __enter__(self) -> "ShardWriter":
        old = sorted(self.folder.glob("*.tar"))
        if old and not self.overwrite:
            raise InputError(
                f"{self.folder} already holds shards ({old[0].name}, ...): name an empty folder, or give --overwrite"
            )
        self._made_folder = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (*old, *self.folder.glob(PARTIAL.format("*"))):
            path.unlink()
        if old:
            # The index of the shards that were removed.
            (self.folder / INDEX).unlink(missing_ok=True)
        return self

    def write(self, sample: Mapping[str, bytes], key: str | None = None) -> None:
        """Adds `sample`, extension ("png", "txt", "json", "npy") -> bytes, under `key` (default: its number)."""
        if self._open is None:
            self._open = _Shard(self.folder, self.n_shard).__enter__()
        self._open.add(key or format_key(self.n_shard, self._open.n_sample), sample)
        self.n_sample += 1
        if self._open.n_sample == self.samples_per_shard:
            self._close(None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(kind)
        if kind is not None and self._made_folder and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _close(self, kind: type[BaseException] | None) -> None:
        if self._open is not None:
            shard, self._open = self._open, None
            shard.__exit__(kind, None, None)
            self.n_shard += 1


class _Shard:
    """One tar file: written aside, renamed on success, removed on failure."""

    def __init__(self, folder: Path, shard: int) -> None:
        self.path = folder / f"{shard:05d}.tar"
        self.partial = folder / PARTIAL.format(f"{shard:05d}")
        self.n_sample = 0

    def __enter__(self) -> "_Shard":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.partial, "wb")
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, sample: Mapping[str, bytes]) -> None:
        try:
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"{key}.{extension}")  # mtime 0, uid 0, no owner
                member.size = len(data)
                member.mode = 0o644
                self.tar.addfile(member, io.BytesIO(data))
        except OSError as error:
            raise self._explained(error) from error
        self.n_sample += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._remove()
            return
        try:
            self.tar.close()
            self.file.close()  # a full disk may show only here
            os.replace(self.partial, self.path)
        except OSError as failure:
            self._remove()
            raise self._explained(failure) from failure

    def _remove(self) -> None:
        with contextlib.suppress(OSError):  # what is still buffered may not fit either; the file closes all the same
            self.file.close()
        self.partial.unlink(missing_ok=True)

    def _explained(self, error: OSError) -> Exception:
        if error.errno in FULL_DISK:
            return InputError(
                f"{self.path}: the disk is full; free some space or write elsewhere (this shard was removed)"
            )
        return error
