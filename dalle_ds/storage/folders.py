"""The folders of a run's checkpoints: begun aside, published by one rename, kept, and checked before they are used.

checkpoints/step-00000500.partial/   being written, or being removed: swept away by the next save
checkpoints/step-00000500/           complete: its marker, complete.json, lists every file with size and SHA-256
checkpoints/corrupt-step-00000500/   did not agree with its marker when it was to be used or replaced; left to the user
checkpoints/replaced-step-00000500/  good, and in the way of a rename; the next save removes it or puts it back
uploading/step-00000500/             links to what is being copied elsewhere: the checkpoint may be removed meanwhile

A process may be killed between any two operations: what was complete stays complete, under one of these names.
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dalle_ds.config import InputError
from dalle_ds.storage.files import PARTIAL, Record, measure, read_json, sync_folder, write_json
from dalle_ds.storage.pieces import PieceReader

CHECKPOINTS, MARKER, SHARDS = "checkpoints", "complete.json", "shards"
LINKS = "uploading"
REPLACED, CORRUPT = "replaced-", "corrupt-"
FORMAT = 3  # 1 was DeepSpeed's own shards; 2 held weights and their average whole, beside the pieces
_COMPLETE = re.compile(rf"(?:{REPLACED})?step-(\d{{8,}})")


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of the run, oldest first; whether their files are whole is another question."""
    found = {}
    # "step-..." comes after "replaced-..." and takes its place.
    for marker in sorted(run.glob(f"{CHECKPOINTS}/*/{MARKER}")):
        step = find_step(marker.parent.name)
        if step is not None:
            found[step] = marker.parent
    return [found[step] for step in sorted(found)]


def find_step(name: str) -> int | None:
    """The step of a complete checkpoint, by the name of its folder; None for any other name."""
    match = _COMPLETE.fullmatch(name)
    return int(match[1]) if match else None


def step_of(checkpoint: Path) -> int:
    step = find_step(checkpoint.name)
    assert step is not None, checkpoint
    return step


def is_checkpoint(folder: Path) -> bool:
    """Whether it is a complete checkpoint, and not a run folder."""
    return (folder / MARKER).exists()


def run_of(folder: Path) -> Path:
    """The run folder, of itself or of one of its checkpoints."""
    return folder.absolute().parent.parent if is_checkpoint(folder) else folder


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """The content of complete.json; empty when it is not to be read."""
    return read_json(checkpoint / MARKER)


def check_format(checkpoint: Path) -> None:
    """Raises InputError for a checkpoint of another version of the format."""
    marker = read_marker(checkpoint)
    if not marker:
        raise InputError(f"{checkpoint / MARKER} cannot be read: bring back a copy, or give an older checkpoint")
    if marker.get("format") != FORMAT:
        raise InputError(
            f"{checkpoint} was written by another version, in another format: use that version, or choose a new --out"
        )


def open_pieces(checkpoint: Path) -> PieceReader:
    """All pieces of parameters in a complete checkpoint: use it in a `with` statement."""
    names = [name for name in read_marker(checkpoint)["files"] if name.startswith(f"{SHARDS}/")]
    return PieceReader((checkpoint / name for name in sorted(names)), str(checkpoint))


# --- writing ----------------------------------------------------------------------------------------------------------


def begin(run: Path, step: int) -> Path:
    """An empty folder to write checkpoint `step` into; sweeps away what earlier saves have left."""
    checkpoints = run / CHECKPOINTS
    checkpoints.mkdir(parents=True, exist_ok=True)
    for left in sorted(checkpoints.glob(f"{REPLACED}step-*")):
        target = checkpoints / left.name.removeprefix(REPLACED)
        if target.exists():
            remove(left)
        else:
            left.rename(target)
    # What cannot be removed stays, such as files that a killed process holds open on a network disk (.nfs...).
    for left in checkpoints.glob(f"*{PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)
    folder = checkpoints / f"step-{step:08d}{PARTIAL}"
    if folder.exists():
        folder.rename(_free_name(checkpoints, f"left-step-{step:08d}", PARTIAL))
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
    aside = checkpoint.with_name(f"{REPLACED}{checkpoint.name}")
    if aside.exists() or not is_checkpoint(checkpoint) or find_faults(checkpoint):
        aside = _free_name(checkpoint.parent, f"{CORRUPT}{checkpoint.name}")
    checkpoint.rename(aside)


def set_aside_after(run: Path, step: int) -> None:
    """Moves complete checkpoints of later steps, all of which are damaged: a run goes on from `step` without them."""
    for checkpoint in complete_checkpoints(run):
        if step_of(checkpoint) > step:
            checkpoint.rename(_free_name(checkpoint.parent, f"{CORRUPT}{checkpoint.name}"))


def _free_name(folder: Path, name: str, suffix: str = "") -> Path:
    """The name, or the name with the first number that makes it a new one."""
    path, n = folder / f"{name}{suffix}", 1
    while path.exists():
        n += 1
        path = folder / f"{name}-{n}{suffix}"
    return path


def retain(run: Path, step: int, keep: int, keep_every: int = 0) -> None:
    """Removes all checkpoints before `step`, which is complete, but the newest `keep` and those of each `keep_every`.

    What is of a later step is left alone: this run did not go on from it.
    """
    replaced = run / CHECKPOINTS / f"{REPLACED}step-{step:08d}"
    if replaced.exists():
        remove(replaced)
    so_far = [checkpoint for checkpoint in complete_checkpoints(run) if step_of(checkpoint) <= step]
    for checkpoint in so_far[:-keep]:
        if not keep_every or step_of(checkpoint) % keep_every:
            remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Takes a checkpoint away: first its name, so that nobody sees half of it."""
    doomed = _free_name(checkpoint.parent, checkpoint.name, PARTIAL)
    os.replace(checkpoint, doomed)
    (doomed / MARKER).unlink(missing_ok=True)
    # What cannot be removed now is swept away by the next save.
    shutil.rmtree(doomed, ignore_errors=True)


# --- checking ---------------------------------------------------------------------------------------------------------


def find_faults(checkpoint: Path, files: Iterable[str] | None = None, *, contents: bool = True) -> list[str]:
    """What is wrong with a complete checkpoint, a line each: of all its files, or of some. Empty when all are whole.

    Without `contents` only sizes are looked at, which takes no time.
    """
    marker = read_marker(checkpoint)
    if "files" not in marker:
        return [f"{checkpoint / MARKER} cannot be read"]
    faults = []
    for name in sorted(marker["files"] if files is None else files):
        fault = _find_fault(checkpoint / name, marker["files"][name], contents)
        if fault:
            faults.append(f"{checkpoint / name} {fault}")
    return faults


def _find_fault(path: Path, record: Record, contents: bool) -> str:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != record["size"]:
        return f"has {size} bytes and was written with {record['size']}"
    try:
        found = measure(path) if contents else record
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if found == record else "has another checksum than when it was written"
