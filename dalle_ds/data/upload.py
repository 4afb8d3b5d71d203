"""Copies of finished checkpoints in S3: made in the background, checked, and fetched again.

    s3://bucket/prefix/config.json ...                        what the run folder holds beside its checkpoints
    s3://bucket/prefix/checkpoints/step-00000500/...          complete.json comes last: without it there is no copy

A copy that fails is a line of warning, and the next checkpoint is tried anew: training never waits for it, but at its
end. Nothing is removed in S3: what stays there is the bucket's own rule (its lifecycle).
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dalle_ds.config import InputError, ReadConfig
from dalle_ds.data.retrying import retrying
from dalle_ds.data.s3 import S3Store

MARKER = "complete.json"
RUN_FILES = ("config.json", "ds_config.json", "tokenizer.model")
LINKS = "uploading"  # folder of the run that holds links to what is under way, so that it may be removed meanwhile
CHUNK = 2**24  # bytes


class Uploader:
    """Called with a finished checkpoint, copies it to `url` while training goes on; `close` waits for the last one.

    When checkpoints come faster than they are copied, those in between are left out.
    """

    def __init__(self, url: str, config: ReadConfig) -> None:
        self.url, self.config, self.store = url.rstrip("/"), config, S3Store(config)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._last: tuple[Path, Future[None]] | None = None

    def __call__(self, checkpoint: Path) -> None:
        if self._last is not None and self._last[1].cancel():
            shutil.rmtree(self._last[0], ignore_errors=True)
        links = checkpoint.parent.parent / LINKS / checkpoint.name
        try:
            shutil.rmtree(links, ignore_errors=True)
            shutil.copytree(checkpoint, links, copy_function=os.link)
        except OSError as error:
            print(f"warning: {checkpoint} was not copied to {self.url}: {error}", flush=True)
            return
        self._last = links, self._thread.submit(self._copy, links, checkpoint)

    def close(self) -> None:
        """Waits until the last checkpoint is copied, or has failed."""
        self._thread.shutdown(wait=True)
        if self._last is not None and self._last[0].parent.exists():
            shutil.rmtree(self._last[0].parent, ignore_errors=True)

    def _copy(self, links: Path, checkpoint: Path) -> None:
        run = links.parent.parent
        files = sorted(path for path in links.rglob("*") if path.is_file() and path.name != MARKER)
        copies = [(run / name, name) for name in RUN_FILES if (run / name).exists()]
        copies += [(path, f"checkpoints/{path.relative_to(links.parent).as_posix()}") for path in files]
        copies += [(links / MARKER, f"checkpoints/{links.name}/{MARKER}")]
        try:
            for path, name in copies:
                retrying(self.config)(self.store.write_file, f"{self.url}/{name}", path)
        except (OSError, InputError) as error:
            print(f"warning: {checkpoint} was not copied to {self.url}: {error}", flush=True)
        finally:
            shutil.rmtree(links, ignore_errors=True)


def open_upload(url: str, config: ReadConfig) -> Uploader | None:
    """What copies to `url`; None where that is empty."""
    return Uploader(url, config) if url else None


def fetch_newest(url: str, out: Path, config: ReadConfig) -> None:
    """Fetches the newest complete checkpoint below `url` into the run folder `out`, unless it has that one or a newer.

    Raises InputError when there is none, and OSError when it cannot be read; no half of one is left.
    """
    url, store = url.rstrip("/"), S3Store(config)
    again = retrying(config)
    markers = again(store.find, f"{url}/checkpoints/step-*/{MARKER}")
    if not markers:
        raise InputError(f"{url}: no complete checkpoint there: give the --loop.upload of the run")
    source = markers[-1].removesuffix(f"/{MARKER}")
    name = source.rpartition("/")[2]
    here = sorted(path.parent.name for path in out.glob(f"checkpoints/step-*/{MARKER}"))
    if here and here[-1] >= name:
        return
    marker = again(store.read_small, markers[-1])
    partial = out / "checkpoints" / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for file, record in json.loads(marker or b"{}")["files"].items():
            path = partial / file
            path.parent.mkdir(parents=True, exist_ok=True)
            again(store.read_file, f"{source}/{file}", path)
            if _record(path) != record:
                raise InputError(f"{source}/{file} is not what was saved: it is damaged there, or on its way")
        (partial / MARKER).write_bytes(marker or b"")
        for file in RUN_FILES:
            content = again(store.read_small, f"{url}/{file}")
            if content is not None and not (out / file).exists():
                (out / file).write_bytes(content)
        partial.rename(out / "checkpoints" / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _record(path: Path) -> dict[str, object]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}
