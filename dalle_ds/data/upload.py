"""Copies of finished checkpoints in S3: made in the background, checked, and fetched again.

    s3://bucket/prefix/config.json ...                        what the run folder holds beside its checkpoints
    s3://bucket/prefix/checkpoints/step-00000500/...          complete.json comes last: without it there is no copy

A copy that fails is a line of warning, and the next checkpoint is tried anew: training never waits for it, but at its
end. Nothing is removed in S3: what stays there is the bucket's own rule (its lifecycle).
"""

import json
import os
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from dalle_ds.config import InputError, ReadConfig
from dalle_ds.data.retrying import retrying
from dalle_ds.data.s3 import S3Store
from dalle_ds.data.store import Transient, Unreadable
from dalle_ds.storage import folders
from dalle_ds.storage.files import measure, replace_file
from dalle_ds.storage.folders import CHECKPOINTS, LINKS, MARKER, complete_checkpoints, find_faults, find_step, step_of

RUN_FILES = ("config.json", "ds_config.json", "tokenizer.model")
# Seconds that a run which was asked to stop, or failed, waits for a copy: launchers that end a run give it 30 in all.
LAST_SECONDS = 20.0


class Uploader:
    """Called with a finished checkpoint, copies it to `url` while training goes on; a context manager.

    When checkpoints come faster than they are copied, those in between are left out. At its end it waits for the last
    one; after an error, and when the run was asked to stop, not for long.
    """

    def __init__(self, url: str, config: ReadConfig) -> None:
        self.url, self.config, self.store = url.rstrip("/"), config, S3Store(config)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._stopped = threading.Event()
        self._last: tuple[Path, Future[None]] | None = None

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else LAST_SECONDS)

    def __call__(self, checkpoint: Path) -> None:
        if self._last is not None and self._last[1].cancel():
            shutil.rmtree(self._last[0], ignore_errors=True)
        links = checkpoint.parent.parent / LINKS / checkpoint.name
        try:
            shutil.rmtree(links, ignore_errors=True)
            shutil.copytree(checkpoint, links, copy_function=os.link)
        except OSError as error:
            self._warn(links, error)
            return
        self._last = links, self._thread.submit(self._copy, links)

    def close(self, seconds: float | None = None) -> None:
        """Waits until the last checkpoint is copied, or has failed; gives up after so many seconds."""
        if self._last is not None:
            links, copy = self._last
            if not copy.done():
                most = "" if seconds is None else f", {seconds:g} s at most"
                print(f"{_checkpoint(links)} is on its way to {self.url}: the run waits for it{most}", flush=True)
            wait([copy], timeout=seconds)
            self._stopped.set()
            if copy.cancel():
                self._warn(links, "the run ends, and an earlier one is not there yet")
        self._thread.shutdown(wait=True)
        if self._last is not None:
            shutil.rmtree(self._last[0].parent, ignore_errors=True)

    def _copy(self, links: Path) -> None:
        run = links.parent.parent
        files = sorted(path for path in links.rglob("*") if path.is_file() and path.name != MARKER)
        copies = [(run / name, name) for name in RUN_FILES if (run / name).exists()]
        copies += [(path, f"{CHECKPOINTS}/{path.relative_to(links.parent).as_posix()}") for path in files]
        copies += [(links / MARKER, f"{CHECKPOINTS}/{links.name}/{MARKER}")]
        try:
            for path, name in copies:
                again = retrying(self.config, self._stopped)
                again(self.store.write_file, f"{self.url}/{name}", path, self._stopped)
        except Exception as error:  # whatever it is, it must not end a run, nor go unsaid
            self._warn(links, "the run ends" if self._stopped.is_set() else error)
        finally:
            shutil.rmtree(links, ignore_errors=True)

    def _warn(self, links: Path, why: object) -> None:
        print(f"warning: {_checkpoint(links)} was not copied to {self.url}: {why}", flush=True)


def _checkpoint(links: Path) -> Path:
    return links.parent.parent / CHECKPOINTS / links.name


class NoUpload:
    """Stands in for `Uploader` where nothing is to be copied."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        pass


def open_upload(url: str, config: ReadConfig) -> Uploader | NoUpload:
    """What copies finished checkpoints to `url`, to be entered; where that is empty, it gives None."""
    return Uploader(url, config) if url else NoUpload()


# --- back -------------------------------------------------------------------------------------------------------------


def fetch_newest(url: str, out: Path, config: ReadConfig) -> None:
    """Fetches the newest whole checkpoint below `url` into the run folder `out`, unless it has that one or a newer.

    One that is damaged there is left out, with a warning. Raises InputError when there is none, in S3 or here, and when
    it cannot be read; no half of one is left.
    """
    url, store = url.rstrip("/"), S3Store(config)
    here = [step_of(path) for path in complete_checkpoints(out) if not find_faults(path)]
    again: Any = retrying(config)
    try:
        markers = again(store.find, f"{url}/{CHECKPOINTS}/step-*/{MARKER}")
        sources = [marker.removesuffix(f"/{MARKER}") for marker in markers]
        steps = {source: find_step(source.rpartition("/")[2]) for source in sources}
        there = sorted((step, source) for source, step in steps.items() if step is not None)
        for step, source in reversed(there):
            if step <= max(here, default=-1):
                return
            fault = _fetch(source, step, url, out, store, again)
            if not fault:
                return
            print(f"warning: {source} is left out, for {fault}", flush=True)
    except (Transient, Unreadable) as error:
        raise InputError(f"--resume {url}: {error}") from None
    what = f"all {len(there)} checkpoints there are damaged" if there else "no complete checkpoint there"
    if here:
        print(f"warning: {url}: {what}: going on with what {out} holds", flush=True)
        return
    raise InputError(f"{url}: {what}: give the --loop.upload of the run")


def _fetch(source: str, step: int, url: str, out: Path, store: S3Store, again: Any) -> str:
    """Fetches one checkpoint; what is wrong with it there, if anything is."""
    try:
        marker = json.loads(again(store.read_small, f"{source}/{MARKER}") or b"{}")
        files = dict(marker["files"])
    except (ValueError, KeyError, TypeError):
        return f"its {MARKER} cannot be read"
    partial = folders.begin(out, step)
    try:
        for name, record in files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            again(store.read_file, f"{source}/{name}", path)
            if measure(path) != record:
                return f"{name} is not what was saved"
        for name in RUN_FILES:
            content = again(store.read_small, f"{url}/{name}")
            if content is not None and not (out / name).exists():
                replace_file(out / name, content)
        folders.publish(partial, marker)
    except Unreadable as error:
        return str(error)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ""
