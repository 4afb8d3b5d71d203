"""Pieces of named parameters in safetensors files, in which no world size, ZeRO stage or machine size shows.

A piece is a run of elements of one parameter, flattened: of its weight, of its running average, or of something else
kept for each of its elements. Each rank writes those that it holds; whoever reads takes those that it needs, and
nothing else: ranks of any other run, or a command that wants the weights whole. Files are written a chunk at a time, so
that no copy of the state is made in memory, and hashed on the way.

This stands in for DeepSpeed's universal checkpoint. That needs a conversion between save and load, knows exp_avg and
exp_avg_sq of one dtype and nothing else (16-bit codes, scales and error buffers would be lost), and in 0.19 loads
several parameter groups wrongly: they share one step count, and all take the settings of the first.
"""

import contextlib
import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_ds.config import InputError
from dalle_ds.storage.files import CHUNK, Record, sync

WEIGHT, AVERAGE = "weight", "average"  # kinds that more than the engine knows of
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
        return self.dtype.itemsize * math.prod(self.shape)


# --- writing ----------------------------------------------------------------------------------------------------------


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
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in _content(entries, tensors, metadata):
            file.write(part)
            digest.update(part)
        size = file.tell()
        sync(file)
    return {"size": size, "sha256": digest.hexdigest()}


def digest_tensors(entries: Sequence[Entry], tensors: Iterable[Tensor]) -> str:
    """The SHA-256 of the file that `write_tensors` would write."""
    digest = hashlib.sha256()
    for part in _content(entries, tensors, None):
        digest.update(part)
    return digest.hexdigest()


def _content(
    entries: Sequence[Entry], tensors: Iterable[Tensor], metadata: dict[str, str] | None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: the length of its header, the header, and the tensors in chunks."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for entry in entries:
        span = [end, end := end + entry.size]
        header[entry.key] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for entry, tensor in zip(entries, tensors, strict=True):
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.key
        flat = tensor.detach().flatten()
        n = CHUNK // entry.dtype.itemsize
        for start in range(0, len(flat), n):
            yield flat[start : start + n].to("cpu").contiguous().view(torch.uint8).numpy().data


# --- reading ----------------------------------------------------------------------------------------------------------


class PieceReader:
    """Pieces in the files of any number of writers: any run of elements, wherever the writers cut.

    Files are mapped into memory, not read. Close it, or use it in a `with` statement. Raises InputError for a file that
    is cut or is no safetensors file; `where` is what later errors speak of.
    """

    def __init__(self, paths: Iterable[Path], where: str = "the checkpoint") -> None:
        from safetensors import SafetensorError, safe_open

        self.where = where
        self._places: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        with contextlib.ExitStack() as files:
            for path in paths:
                try:
                    file = files.enter_context(safe_open(path, "pt"))
                except SafetensorError as error:
                    raise InputError(f"{path} is damaged ({error}): take an older checkpoint") from None
                for name, values in json.loads(file.metadata()[SCALARS]).items():
                    self.scalars.setdefault(name, {}).update(values)
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    name, kind, begin = key.rsplit(SEPARATOR, 2)
                    length = file.get_slice(key).get_shape()[0]
                    self._places.setdefault((name, kind), []).append((int(begin), length, file, key))
            self._files = files.pop_all()
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

    def has(self, kind: str) -> bool:
        """Whether there is anything of that kind, of any parameter."""
        return any(kind in kinds for kinds in self._kinds.values())

    def check_fit(self, sizes: Mapping[str, int]) -> None:
        """Raises InputError, naming a parameter, unless the weights are those of a model of these numbers of elements.

        Elements that are missing are left to `read`, which finds them.
        """
        for name in [*sizes, *self._kinds]:
            places = self._places.get((name, WEIGHT), [_NOWHERE])
            if name not in sizes or name not in self._kinds or max(p[0] + p[1] for p in places) > sizes[name]:
                raise InputError(f"{self.where} is of another model: parameter {name!r} does not fit: use its settings")

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
                    f"{self.where} lacks elements {at} to {end} of {name} ({kind}): "
                    "take an older checkpoint, or another --out"
                )
            stop = min(end, first + size)
            parts.append(file.get_slice(key)[at - first : stop - first])
            at = stop
        if not parts:
            return torch.empty(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
