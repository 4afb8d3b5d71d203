"""Pieces of named parameters in safetensors files, in which no world size, ZeRO stage or machine size shows.

A piece is a run of elements of one parameter, flattened: of its weight, or of something kept for each of its elements.
Each rank writes those that it holds; any rank of any other run reads those that it needs, and nothing else. Files are
written a chunk at a time, so that no copy of the state is made in memory, and hashed on the way.
"""

import contextlib
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_ds.config import InputError

CHUNK = 2**24  # bytes
SEPARATOR = "|"  # in keys: name|kind|begin
SCALARS = "scalars"  # entry of a file's metadata: name -> numbers kept for the whole parameter
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_NOWHERE: tuple[int, int, Any, str] = (0, 0, None, "")

Record = dict[str, Any]
"""{"size": bytes, "sha256": hexadecimal} of a file"""


@dataclass(frozen=True, eq=False)
class Piece:
    """The elements [begin, begin + len(tensor)) of the flattened parameter `name`; kind is "weight", or what else."""

    name: str
    kind: str
    begin: int
    tensor: Tensor

    @property
    def key(self) -> str:
        return SEPARATOR.join((self.name, self.kind, str(self.begin)))


@dataclass(frozen=True)
class Entry:
    """A tensor of a file that is still to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_pieces(path: Path, pieces: Iterable[Piece], scalars: dict[str, dict[str, float]]) -> Record:
    """Writes pieces, and numbers kept for whole parameters (name -> {"step": 3.0}); returns the file's record."""
    # The readers of safetensors want every tensor aligned to its elements.
    ordered = sorted(pieces, key=lambda piece: -piece.tensor.dtype.itemsize)
    entries = [Entry(piece.key, piece.tensor.dtype, tuple(piece.tensor.shape)) for piece in ordered]
    return write_tensors(path, entries, (piece.tensor for piece in ordered), {SCALARS: json.dumps(scalars)})


def write_tensors(
    path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor], metadata: dict[str, str] | None = None
) -> Record:
    """Writes one safetensors file of `entries`, whose tensors come one by one; it is on the disk when this returns.

    Entries of wider elements come before those of narrower ones. Returns the file's record.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for entry in entries:
        span = [end, end := end + entry.size]
        header[entry.key] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for entry, tensor in zip(entries, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.key
            flat = tensor.detach().flatten()
            n = CHUNK // entry.dtype.itemsize
            for start in range(0, len(flat), n):
                content = flat[start : start + n].to("cpu").contiguous().view(torch.uint8).numpy().data
                file.write(content)
                digest.update(content)
        sync(file)
    return {"size": 8 + len(text) + end, "sha256": digest.hexdigest()}


def write_json(path: Path, content: Any) -> Record:
    """Writes JSON that is on the disk when this returns; its record."""
    text = (json.dumps(content) + "\n").encode()
    with path.open("wb") as file:
        file.write(text)
        sync(file)
    return {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}


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
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while part := file.read(CHUNK):
            digest.update(part)
            size += len(part)
    return {"size": size, "sha256": digest.hexdigest()}


class PieceReader:
    """Pieces in the files of any number of writers: any run of elements, wherever the writers cut.

    Close it, or use it in a `with` statement.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        from safetensors import safe_open

        self._files = contextlib.ExitStack()
        self._places: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        for path in paths:
            file = self._files.enter_context(safe_open(path, "pt"))
            for name, values in json.loads(file.metadata()[SCALARS]).items():
                self.scalars.setdefault(name, {}).update(values)
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                name, kind, begin = key.rsplit(SEPARATOR, 2)
                length = file.get_slice(key).get_shape()[0]
                self._places.setdefault((name, kind), []).append((int(begin), length, file, key))
        for places in self._places.values():
            places.sort(key=lambda place: place[:2])
        self._kinds: dict[str, list[str]] = {}
        for name, kind in sorted(self._places):
            self._kinds.setdefault(name, []).append(kind)

    def __enter__(self) -> "PieceReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()

    def kinds(self, name: str) -> list[str]:
        """What there is of a parameter."""
        return self._kinds.get(name, [])

    def read(self, name: str, kind: str, begin: int, length: int) -> Tensor:
        """Elements [begin, begin + length) of the flattened parameter, in the dtype in which they were written.

        Raises InputError, naming the parameter, when some of them are in no file.
        """
        places = self._places.get((name, kind), [])
        at, end = begin, begin + length
        parts: list[Tensor] = []
        while at < end:
            index = bisect_right(places, at, key=lambda place: place[0]) - 1
            first, size, file, key = places[max(0, index)] if places else _NOWHERE
            if not first <= at < first + size:
                raise InputError(
                    f"the checkpoint lacks elements {at} to {end} of {name} ({kind}): "
                    "take an older checkpoint, or another --out"
                )
            stop = min(end, first + size)
            parts.append(file.get_slice(key)[at - first : stop - first])
            at = stop
        if not parts:
            return torch.empty(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
