"""A run folder: whether a run may begin in it or go on, from which checkpoint, and what is written beside them.

config.json (kind, resolved configuration), ds_config.json (as used), metrics.jsonl, checkpoints/, samples/.
"""

import hashlib
import json
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dalle_ds.config import InputError
from dalle_ds.storage.files import read_json, replace_file
from dalle_ds.storage.folders import (
    CHECKPOINTS,
    LINKS,
    check_format,
    complete_checkpoints,
    find_faults,
    read_marker,
    set_aside_after,
)
from dalle_ds.training.agreement import from_first, gather, is_first, own_share
from dalle_ds.training.changes import CONFIG

IN_S3 = "s3://"
# A network disk may go on saying for half a minute that there is no file where another machine has made one.
LATE_SECONDS = 60.0


def open_run(out: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, or None to begin. Where there is a process group, every rank must call.

    resume: "auto" takes the newest complete checkpoint of the run folder, if there is one, whose files all have the
    size and checksum with which they were written; those that have not are named in a warning, and set aside once
    the run goes on (`write_run`).
    "none" begins anew. What there is, the first rank sees; the others must see it too. Raises InputError when they do
    not, when "none" would write over a run, and when no checkpoint is whole.
    """
    names = from_first(lambda: _find_checkpoints(out, resume), out)
    for name in reversed(names):
        checkpoint = out / CHECKPOINTS / name
        _check_marker_is_seen(checkpoint)
        marker = read_marker(checkpoint)
        if marker:
            check_format(checkpoint)
        files = own_share(marker.get("files", ()))
        faults = [fault for own in gather(find_faults(checkpoint, files)) for fault in own]
        if not faults:
            return checkpoint
        if is_first():
            print(f"warning: {checkpoint} is left out, for it is damaged: {faults[0]}", flush=True)
    if names:
        raise InputError(
            f"{out}: all {len(names)} checkpoints are damaged: bring back a copy of one, or choose another --out"
        )
    return None


def _find_checkpoints(out: Path, resume: str) -> list[str]:
    """Names of the complete checkpoints, oldest first."""
    if resume not in ("auto", "none"):
        raise InputError(f"--resume {resume!r} is neither auto nor none nor s3://bucket/prefix")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    checkpoints = complete_checkpoints(out)
    if resume == "none" and (checkpoints or (out / CONFIG).exists()):
        raise InputError(f"{out} already holds a run: pass --resume auto to go on with it, or choose another --out")
    if checkpoints and "imported" in read_json(checkpoints[-1] / CONFIG):
        raise InputError(f"{out} holds imported weights and no optimizer: pass --init_from {out} and another --out")
    return [checkpoint.name for checkpoint in checkpoints]


def _check_marker_is_seen(checkpoint: Path) -> None:
    def digest() -> str:
        return hashlib.sha256(json.dumps(read_marker(checkpoint)).encode()).hexdigest()

    first = from_first(digest, checkpoint)
    _check_seen(checkpoint, lambda: digest() == first)


def _check_seen(path: Path, sees: Callable[[], bool]) -> None:
    """Raises InputError, on every rank, unless all of them see what the first one does, after a while at the latest."""
    deadline = time.monotonic() + LATE_SECONDS
    while not (seen := sees()) and time.monotonic() < deadline:
        time.sleep(1.0)
    hosts = gather((seen, socket.gethostname()))
    blind = [(rank, host) for rank, (seen, host) in enumerate(hosts) if not seen]
    if blind:
        (rank, host), more = blind[0], f" (and {len(blind) - 1} more)" if len(blind) > 1 else ""
        raise InputError(
            f"rank {rank} on {host}{more} does not see {path}, which rank 0 on {hosts[0][1]} sees: "
            "--out must be on a disk that all machines share"
        )


def fetched(resume: str, out: Path, fetch: Callable[[str, Path], None]) -> str:
    """What --resume means to `open_run`: for s3://bucket/prefix, "auto" after the first rank has fetched what is there.

    `fetch(url, run folder)` brings the newest checkpoint, where the folder has none that is newer.
    """
    if not resume.startswith(IN_S3):
        return resume
    from_first(lambda: fetch(resume, out), out)
    return "auto"


def write_run(out: Path, documents: Mapping[str, Any], start: int = 0) -> None:
    """Makes the run folder, with its JSON files by name: config.json, ds_config.json; every rank must call.

    The run goes on from the checkpoint of step `start`, the newest whole one: later ones are set aside. The first rank
    writes. Raises InputError when others do not see it, as they could not save.
    """
    if is_first():
        out.mkdir(parents=True, exist_ok=True)
        (out / "samples").mkdir(exist_ok=True)
        shutil.rmtree(out / LINKS, ignore_errors=True)  # what a killed run was copying
        if start:
            set_aside_after(out, start)
        for name, content in documents.items():
            replace_file(out / name, (json.dumps(content, indent=2) + "\n").encode())
    gather(None)  # the first one has written
    _check_seen(out / CONFIG, (out / CONFIG).exists)
