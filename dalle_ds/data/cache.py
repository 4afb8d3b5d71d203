"""A bounded cache of parts of shards on a local disk, shared by all processes of a machine.

A part is written aside and renamed, so a reader meets a whole one or none; who removes holds a file lock. Only what
was checked against the index is put in, and it is checked again when it comes out (stream.py).
"""

import contextlib
import os
import threading
import time
from pathlib import Path

from filelock import FileLock

from dalle_ds.config import FULL_DISK

LOCK, PARTIAL = ".lock", ".partial"
# Removing goes on until this much of the bound is left, and starts when a process has written a share of the rest:
# eight processes that write at once stay within the bound.
KEEP, SHARE = 7 / 8, 1 / 64
ABANDONED_SECONDS = 3600.0


class PartCache:
    """Parts by name in `folder`, at most `max_bytes` of them; those not used for longest are removed first."""

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._n_written = max_bytes  # look at what is there before the first part is added
        self._counting = threading.Lock()

    def get(self, name: str) -> bytes | None:
        path = self.folder / name
        try:
            content = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        return content

    def put(self, name: str, content: bytes) -> None:
        """Keeps `content`, if it fits; a full disk is no error, for the cache can be done without."""
        if len(content) > self.max_bytes * (1 - KEEP):
            return
        with self._counting:
            self._n_written += len(content)
            full = self._n_written > self.max_bytes * SHARE
            if full:
                self._n_written = len(content)
        if full:
            self.shrink(len(content))
        partial = self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}{PARTIAL}"
        try:
            partial.write_bytes(content)
            partial.replace(self.folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if error.errno not in FULL_DISK:
                raise

    def drop(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def shrink(self, n_coming: int = 0) -> None:
        """Removes the parts that were not used for longest, until there is room for `n_coming` bytes."""
        with FileLock(self.folder / LOCK):
            parts = []
            for entry in os.scandir(self.folder):
                # Another process may have replaced it, or dropped it, since.
                with contextlib.suppress(FileNotFoundError):
                    state = entry.stat()
                    if not entry.name.startswith("."):
                        parts.append((state.st_mtime_ns, state.st_size, entry.path))
                    elif entry.name.endswith(PARTIAL) and time.time() - state.st_mtime > ABANDONED_SECONDS:
                        os.unlink(entry.path)
            n_held = sum(size for _, size, _ in parts)
            for _, size, path in sorted(parts):
                if n_held + n_coming <= self.max_bytes * KEEP:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                n_held -= size
