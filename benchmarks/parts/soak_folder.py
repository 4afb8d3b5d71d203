"""A run folder as somebody sees it who only looks on, while the run goes on: how far it is, and what it has saved."""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dalle_ds.storage.files import PARTIAL
from dalle_ds.storage.folders import complete_checkpoints, find_faults, read_marker, step_of
from dalle_ds.training.changes import CONFIG
from dalle_ds.training.metrics import read_metrics

TAIL = 4096  # bytes: more than a line of metrics.jsonl
CLOCKED = ("time", "images_per_second")
BEING_WRITTEN = re.compile(rf"step-(\d+){re.escape(PARTIAL)}")


class RunFolder:
    """The folder `path`, seen from the beginning of an attempt to go on with the run (`begin`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begin()

    def begin(self) -> None:
        """Notes what is there before the attempt begins."""
        self.start = self.newest()
        self._old_metrics = self._metrics_id()
        self._old_partials = {(path.name, _identity(path)) for path in self._partials()}

    def newest(self) -> int:
        """The step of the newest checkpoint that is complete; 0 where there is none."""
        complete = complete_checkpoints(self.path)
        return step_of(complete[-1]) if complete else 0

    def is_under_way(self) -> bool:
        """Whether this attempt has come to its first step: metrics.jsonl is made anew then."""
        return self._metrics_id() not in (None, self._old_metrics)

    def last_step(self) -> int:
        """The last step that this attempt tells of; where it began when it tells of none."""
        if not self.is_under_way():
            return self.start
        with (self.path / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            for line in reversed(file.read().splitlines()):
                with contextlib.suppress(json.JSONDecodeError):
                    return int(json.loads(line)["step"])
        return self.start

    def saving(self) -> int:
        """The step of the checkpoint that this attempt is writing; 0 when it writes none."""
        newest = self.newest()
        for path in self._partials():
            found = BEING_WRITTEN.fullmatch(path.name)
            if found and int(found[1]) > newest and (path.name, _identity(path)) not in self._old_partials:
                return int(found[1])
        return 0

    def faults(self) -> list[str]:
        """What is wrong with any checkpoint that counts as complete."""
        return [fault for checkpoint in complete_checkpoints(self.path) for fault in find_faults(checkpoint)]

    def records(self, step: int) -> dict[str, Any]:
        """Size and checksum of each file of a checkpoint, but for that which says how many checkpoints are kept."""
        files = read_marker(self.checkpoint(step))["files"]
        return {name: record for name, record in files.items() if name != CONFIG}

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}"

    def lines(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says, but for what the clock says."""
        lines = read_metrics(self.path / "metrics.jsonl")
        return [{name: value for name, value in line.items() if name not in CLOCKED} for line in lines]

    def _partials(self) -> list[Path]:
        return sorted(self.path.glob(f"checkpoints/*{PARTIAL}"))

    def _metrics_id(self) -> tuple[int, int] | None:
        return _identity(self.path / "metrics.jsonl")


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file or folder that nobody writes to any more from a later one of the same name.

    Its number alone does not: a file system may give it to the next one as soon as it is free.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def differences(ours: Path, theirs: Path, names: Mapping[str, Any]) -> list[str]:
    """The tensors of two checkpoints that are not equal bit for bit, and the other files; `names` are their files."""
    found = []
    for name in sorted(names):
        if not name.endswith(".safetensors"):
            found += [] if (ours / name).read_bytes() == (theirs / name).read_bytes() else [name]
            continue
        with safe_open(ours / name, "pt") as mine, safe_open(theirs / name, "pt") as other:
            keys = [set(file.keys()) for file in (mine, other)]
            found += [f"{name}: {key}" for key in sorted(keys[0] ^ keys[1])]
            for key in sorted(keys[0] & keys[1]):
                if _bytes(mine.get_tensor(key)) != _bytes(other.get_tensor(key)):
                    found.append(f"{name}: {key}")
    return found


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
