"""The state of a run of encode-images, kept in its folder of token shards: what is done, and of which data.

Units of work are numbered; unit i makes shard i, and a marker encoding/<i>.json once the shard is whole. So any number
of processes share the work without talking, a run that was killed goes on, and the result is the same bytes. The
manifest comes last, when no marker is missing. encoding/recipe.json says how pictures became tokens.
"""

import dataclasses
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dalle_ds.config import InputError, require
from dalle_ds.data.skips import SkipLog
from dalle_ds.data.sources import PATH_SEPARATOR, PICTURES_PER_PART, Source
from dalle_ds.data.token_shards import MANIFEST, TokenManifest, write_manifest
from dalle_ds.data.writer import PARTIAL, write_shard

STATE, RECIPE, SKIPPED = "encoding", "recipe.json", "skipped.jsonl"
OVERWRITE = "name an empty folder, or give --overwrite"


@dataclass(frozen=True)
class Unit:
    """Parts of a source that become one token shard: one shard, or some pictures of a folder."""

    index: int
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """Tells units apart: the shard's url, or the folder, how many pictures of it, and a digest of their names."""
        root, found, _ = self.parts[0].partition(PATH_SEPARATOR)
        if not found:
            return root
        digest = hashlib.sha256("\n".join(self.parts).encode(errors="surrogateescape")).hexdigest()[:16]
        return f"{root}, {sum(part.count(PATH_SEPARATOR) for part in self.parts)} pictures {digest}"


@dataclass(frozen=True, kw_only=True)
class Marker:
    """What encoding/<index>.json says of a unit that is done; `used` has a bit for each token of the vocabulary."""

    unit: str
    n_samples: int
    n_bytes: int
    sha256: str
    used: str
    skipped: list[list[str]]


class UnitLog(SkipLog):
    """The samples of one unit that are left out, for its marker."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[list[str]] = []

    def add(self, key: str, origin: str, reason: str) -> None:
        super().add(key, origin, reason)
        self.skipped.append([key, origin, reason])


def divide(source: Source, samples_per_shard: int) -> list[Unit]:
    """One unit for each shard of the source; pictures of a folder are taken together up to samples_per_shard."""
    n_parts = max(1, samples_per_shard // PICTURES_PER_PART)
    groups: list[list[str]] = []
    for part in source.parts:
        root, is_pictures, _ = part.partition(PATH_SEPARATOR)
        together = groups and is_pictures and groups[-1][0].partition(PATH_SEPARATOR)[0] == root
        if together and len(groups[-1]) < n_parts:
            groups[-1].append(part)
        else:
            groups.append([part])
    return [Unit(index, tuple(parts)) for index, parts in enumerate(groups)]


class Encoding:
    """The folder of token shards that `units` become by `recipe` (JSON values that a later run must have again)."""

    def __init__(self, folder: Path, units: list[Unit], recipe: Mapping[str, Any]) -> None:
        self.folder, self.units, self.recipe = folder, units, dict(recipe)
        self.state = folder / STATE

    def check(self) -> None:
        """Raises InputError when the folder holds anything but an earlier run of the same recipe on the same data."""
        require(not self.folder.exists() or self.folder.is_dir(), f"--out {self.folder} is a file: name a folder")
        shards = sorted(self.folder.glob("*.tar"))
        recipe = _read_json(self.state / RECIPE)
        if recipe is None:
            if shards or (self.folder / MANIFEST).exists():
                name = shards[0].name if shards else MANIFEST
                raise InputError(f"{self.folder} already holds shards of something else ({name}): {OVERWRITE}")
            return
        for key in {**recipe, **self.recipe}:
            if recipe.get(key) != self.recipe.get(key):
                raise InputError(
                    f"{self.folder} already holds shards encoded with {key} {recipe.get(key)}, not "
                    f"{self.recipe.get(key)}: {OVERWRITE}"
                )
        wanted = {f"{unit.index:05d}": unit.name for unit in self.units}
        for path in sorted(self.state.glob("[0-9]*.json")):
            marker = self._read_marker(path)
            if marker is not None and wanted.get(path.stem) != marker.unit:
                raise InputError(f"{self.folder} already holds shards of other data ({marker.unit}): {OVERWRITE}")

    def clear(self) -> None:
        """Removes an earlier run, whatever it was of."""
        for path in (*self.folder.glob("*.tar"), self.folder / MANIFEST, self.folder / SKIPPED):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.state, ignore_errors=True)

    def begin(self) -> list[Unit]:
        """The units that are left to do. Removes what a killed run left half-written, and a manifest not yet due."""
        for path in (*self.folder.glob(PARTIAL.format("*")), *self.state.glob(".*.partial")):
            path.unlink(missing_ok=True)
        left = [unit for unit in self.units if self.find(unit) is None]
        if left:
            (self.folder / MANIFEST).unlink(missing_ok=True)
        return left

    def find(self, unit: Unit) -> Marker | None:
        """The unit's marker, when it is done: its shard is there, and has the size that the marker says."""
        marker = self._read_marker(self._marker_path(unit))
        if marker is None or marker.unit != unit.name:
            return None
        shard = self._shard_path(unit)
        n_bytes = shard.stat().st_size if shard.exists() else 0
        return marker if n_bytes == marker.n_bytes else None

    def write(self, unit: Unit, samples: Iterable[Mapping[str, bytes]], log: UnitLog, used: set[int]) -> Marker:
        """Writes the unit's shard, then its marker; `log` and `used` are filled while `samples` are made.

        A unit without a sample has a marker but no shard.
        """
        n_samples = 0

        def counted() -> Iterator[Mapping[str, bytes]]:
            nonlocal n_samples
            for sample in samples:
                if n_samples == 0:
                    _write_json(self.state / RECIPE, self.recipe)
                n_samples += 1
                yield sample

        shard = write_shard(self.folder, unit.index, counted())
        if n_samples == 0:
            shard.unlink()
        content = shard.read_bytes() if n_samples else b""
        marker = Marker(
            unit=unit.name,
            n_samples=n_samples,
            n_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            used=_to_bits(used),
            skipped=sorted(log.skipped),
        )
        _write_json(self.state / RECIPE, self.recipe)
        _write_json(self._marker_path(unit), dataclasses.asdict(marker))
        return marker

    def finish(self, *, grid_size: int, vocab_size: int, dvae: str) -> tuple[TokenManifest, int, SkipLog] | None:
        """Once every unit is done: writes skipped.jsonl and the manifest; None before.

        Returns the manifest, how many tokens of the vocabulary are used, and the log of what was left out. Raises
        InputError when not one sample could be used; only skipped.jsonl is left then. Several processes may call this
        at the same time: they write the same bytes.
        """
        if sum(1 for _ in self.state.glob("[0-9]*.json")) < len(self.units):
            return None
        markers = [self.find(unit) for unit in self.units]
        done = [marker for marker in markers if marker is not None]
        if len(done) < len(markers):
            return None
        log = self._write_skipped(done)
        n_samples = sum(marker.n_samples for marker in done)
        if n_samples == 0:
            shutil.rmtree(self.state, ignore_errors=True)
            raise InputError(f"not one of {log.n_skipped} samples can be used: {log.summary()}")
        used: set[int] = set()
        for marker in done:
            used |= _from_bits(marker.used)
        manifest = TokenManifest(
            n_samples=n_samples,
            grid_size=grid_size,
            vocab_size=vocab_size,
            dvae=dvae,
            dvae_sha256=self.recipe["dvae_sha256"],
        )
        write_manifest(self.folder, manifest)
        return manifest, len(used), log

    def _write_skipped(self, markers: list[Marker]) -> SkipLog:
        path = self.folder / SKIPPED
        log, lines = SkipLog(), []
        for marker in markers:
            for key, origin, reason in marker.skipped:
                log.add(key, origin, reason)
                line = {"key": key, "origin": origin, "reason": reason}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        if lines:
            _replace(path, "".join(lines))
            log.path = path
        else:
            path.unlink(missing_ok=True)
        return log

    def _marker_path(self, unit: Unit) -> Path:
        return self.state / f"{unit.index:05d}.json"

    def _shard_path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.index:05d}.tar"

    def _read_marker(self, path: Path) -> Marker | None:
        values = _read_json(path)
        names = {field.name for field in dataclasses.fields(Marker)}
        return Marker(**values) if values is not None and set(values) == names else None


def _to_bits(tokens: set[int]) -> str:
    flags = np.zeros(max(tokens, default=-1) + 1, dtype=np.uint8)
    flags[list(tokens)] = 1
    return np.packbits(flags).tobytes().hex()


def _from_bits(bits: str) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))).tolist())


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None when it is missing or no such thing, as after a crash of the machine."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    # Processes of several machines may write the same file at the same time.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
