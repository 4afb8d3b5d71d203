"""What the index knows of one shard: one JSON line."""

import base64
import json
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TAR_BLOCK = 512
# The unit of checking: what a resume in the middle of a shard may read for nothing, at most.
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its name in its folder, and what tells that its bytes are whole, right and of the same version.

    `offsets` are the places in the tar of each sample's first header; `crc32` has one number for every `block_bytes`
    (none, and an empty sha256, for a local shard that was only scanned). `etag` is that of a remote shard, `mtime_ns`
    that of a local one.
    """

    name: str
    n_bytes: int
    sha256: str
    etag: str | None
    offsets: Sequence[int]
    crc32: Sequence[int] = ()
    block_bytes: int = BLOCK_BYTES
    mtime_ns: int | None = None

    @property
    def n_samples(self) -> int:
        return len(self.offsets)


def format_entry(entry: ShardEntry) -> str:
    """The JSON line of `entry`.

    Offsets are the gaps between them in blocks of 512 bytes, as base64 of zlib of little-endian 32-bit numbers: for
    250 million samples 0.5 GB and some ten seconds of reading, where plain numbers would take minutes.
    """
    assert all(offset % TAR_BLOCK == 0 for offset in entry.offsets)
    values: dict[str, Any] = {"name": entry.name, "n_bytes": entry.n_bytes, "n_samples": entry.n_samples}
    values |= {"sha256": entry.sha256, "etag": entry.etag, "mtime_ns": entry.mtime_ns, "block_bytes": entry.block_bytes}
    values["crc32"] = base64.b64encode(np.asarray(entry.crc32, "<u4").tobytes()).decode()
    gaps = np.diff(np.asarray(entry.offsets, np.int64), prepend=0) // TAR_BLOCK
    values["gaps"] = base64.b64encode(zlib.compress(gaps.astype("<u4").tobytes())).decode()
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def parse_entry(line: str | bytes) -> ShardEntry:
    """The entry of a JSON line. Raises ValueError or TypeError when it is none."""
    values = json.loads(line)
    if not isinstance(values, dict) or not {"name", "n_bytes", "sha256", "etag", "gaps"} <= values.keys():
        raise ValueError("not the entry of a shard")
    try:
        gaps = np.frombuffer(zlib.decompress(base64.b64decode(values["gaps"])), "<u4")
    except zlib.error as error:
        raise ValueError(f"the gaps do not unpack ({error})") from None
    # Arrays: 250 million samples as a tuple of Python numbers would take 10 GB in every process.
    offsets = array("Q", np.cumsum(gaps.astype(np.uint64) * TAR_BLOCK, dtype=np.uint64).tobytes())
    crc32 = np.frombuffer(base64.b64decode(values.get("crc32", "")), "<u4").astype(np.uint32)
    entry = ShardEntry(
        values["name"],
        int(values["n_bytes"]),
        values["sha256"],
        values["etag"],
        offsets,
        array("I", crc32.tobytes()),
        int(values.get("block_bytes", BLOCK_BYTES)),
        values.get("mtime_ns"),
    )
    if len(offsets) != values.get("n_samples", len(offsets)):
        raise ValueError(f"{len(offsets)} offsets for {values['n_samples']} samples")
    if len(crc32) and len(entry.crc32) != -(-entry.n_bytes // entry.block_bytes):
        raise ValueError(f"{len(entry.crc32)} checksums for {entry.n_bytes} bytes")
    return entry
