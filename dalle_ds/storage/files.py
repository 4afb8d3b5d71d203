"""Files and folders that are whole or not there: written aside, on the disk when a call returns, and measured."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dalle_ds.config import InputError

PARTIAL = ".partial"  # ends the name of what is being written
CHUNK = 2**24  # bytes

Record = dict[str, Any]
"""{"size": bytes, "sha256": hexadecimal} of a file"""


def write_json(path: Path, content: Any) -> Record:
    """Writes JSON that is on the disk when this returns; its record."""
    text = (json.dumps(content) + "\n").encode()
    with path.open("wb") as file:
        file.write(text)
        sync(file)
    return {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file: killed in between, or on a full disk, what it held before is still there."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            sync(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(file: Any) -> None:
    """What was written to the open file is on the disk afterwards."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """What was made, renamed or removed in the folder is on the disk afterwards."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measure(path: Path) -> Record:
    """The record of a file as the disk has it: what the system keeps of it in memory is let go first."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        # A file system that is only read from may refuse, and has nothing to write.
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while part := file.read(CHUNK):
            digest.update(part)
            size += len(part)
    return {"size": size, "sha256": digest.hexdigest()}


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end, and is gone when something fails.

    Raises InputError when `out` holds anything.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    if (out / "config.json").exists():
        raise InputError(f"{out} already holds a run: choose another --out, or remove it")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out} is not empty: name a new folder")
    out = out.absolute()
    aside = out.with_name(f".{out.name}.{os.getpid()}{PARTIAL}")
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.replace(out)  # which may be there, empty
    finally:
        shutil.rmtree(aside, ignore_errors=True)
