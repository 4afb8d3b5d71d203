"""The folders of a run's checkpoints: begun aside, published by one rename, kept, and checked before they are used.

checkpoints/step-00000500.partial/   being written, or being removed: swept away by the next save
checkpoints/step-00000500/           complete: its marker, complete.json, lists every file with size and SHA-256
checkpoints/corrupt-step-00000500/   did not agree with its marker when its step was saved again; left to the user
checkpoints/replaced-step-00000500/  good, and in the way of a rename; the next save removes it or puts it back

A process may be killed between any two operations: what was complete stays complete, under one of these names.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dalle_ds.training.portable import Record, measure, sync, sync_folder, write_json

MARKER = "complete.json"
PARTIAL, REPLACED, CORRUPT = ".partial", "replaced-", "corrupt-"
FORMAT = 2  # 1 was DeepSpeed's own shards
COMPLETE = re.compile(rf"(?:{REPLACED})?step-(\d{{8,}})")


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of the run, oldest first; whether their files are whole is another question."""
    found = {}
    # "step-..." comes after "replaced-..." and takes its place.
    for marker in sorted(run.glob(f"checkpoints/*/{MARKER}")):
        if match := COMPLETE.fullmatch(marker.parent.name):
            found[int(match[1])] = marker.parent
    return [found[step] for step in sorted(found)]


def step_of(checkpoint: Path) -> int:
    match = COMPLETE.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """The content of complete.json; empty when it is not to be read."""
    try:
        content = json.loads((checkpoint / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def begin(run: Path, step: int) -> Path:
    """An empty folder to write checkpoint `step` into; sweeps away what earlier saves have left."""
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for left in sorted(checkpoints.glob(f"{REPLACED}step-*")):
        target = checkpoints / left.name.removeprefix(REPLACED)
        if target.exists():
            remove(left)
        else:
            left.rename(target)
    for left in checkpoints.glob(f"*{PARTIAL}"):
        shutil.rmtree(left)
    folder = checkpoints / f"step-{step:08d}{PARTIAL}"
    folder.mkdir()
    return folder


def publish(partial: Path, content: dict[str, Any]) -> Path:
    """Marks the written folder complete, with `content`, and gives it its name; returns the checkpoint."""
    target = partial.with_name(partial.name.removesuffix(PARTIAL))
    write_json(partial / MARKER, {"format": FORMAT, **content})
    for folder in (*(path for path in partial.iterdir() if path.is_dir()), partial):
        sync_folder(folder)
    if target.exists():
        _set_aside(target)
    partial.rename(target)
    sync_folder(target.parent)
    return target


def _set_aside(checkpoint: Path) -> None:
    """Moves what already bears the name of a new checkpoint: one that is not whole is not ours to remove."""
    good = (checkpoint / MARKER).exists() and not find_faults(checkpoint)
    aside = checkpoint.with_name((REPLACED if good else CORRUPT) + checkpoint.name)
    n = 1
    while aside.exists():
        n += 1
        aside = checkpoint.with_name(f"{CORRUPT}{checkpoint.name}-{n}")
    checkpoint.rename(aside)


def retain(run: Path, step: int, keep: int, keep_every: int = 0) -> None:
    """Removes all checkpoints before `step`, which is complete, but the newest `keep` and those of each `keep_every`.

    What is of a later step is left alone: this run did not go on from it.
    """
    replaced = run / "checkpoints" / f"{REPLACED}step-{step:08d}"
    if replaced.exists():
        remove(replaced)
    so_far = [checkpoint for checkpoint in complete_checkpoints(run) if step_of(checkpoint) <= step]
    for checkpoint in so_far[:-keep]:
        if not keep_every or step_of(checkpoint) % keep_every:
            remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Takes a checkpoint away: first its name, so that nobody sees half of it."""
    doomed = checkpoint.with_name(f"{checkpoint.name}{PARTIAL}")
    os.replace(checkpoint, doomed)
    (doomed / MARKER).unlink(missing_ok=True)
    # What cannot be removed now is swept away by the next save.
    shutil.rmtree(doomed, ignore_errors=True)


def find_faults(checkpoint: Path, files: Iterable[str] | None = None) -> list[str]:
    """What is wrong with a complete checkpoint, a line each: of all its files, or of some. Empty when all are whole."""
    marker = read_marker(checkpoint)
    if "files" not in marker:
        return [f"{checkpoint / MARKER} cannot be read"]
    faults = []
    for name in sorted(marker["files"] if files is None else files):
        fault = _find_fault(checkpoint / name, marker["files"][name])
        if fault:
            faults.append(f"{checkpoint / name} {fault}")
    return faults


def _find_fault(path: Path, record: Record) -> str:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != record["size"]:
        return f"has {size} bytes and was written with {record['size']}"
    try:
        found = measure(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if found == record else "has another checksum than when it was written"


def replace_text(path: Path, text: str) -> None:
    """Writes a file of the run folder: killed in between, or on a full disk, what it held before is still there."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("w") as file:
            file.write(text)
            sync(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
