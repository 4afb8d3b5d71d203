"""Pictures as a user names them, without captions: files, folders of files, and shards.

For commands that only look at pictures; training data are sources (see sources.py).
"""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dalle_ds.config import InputError
from dalle_ds.data import shards as tar_shards
from dalle_ds.data.skips import BadSample
from dalle_ds.data.sources import IMAGE_EXTENSIONS


class PictureFile(NamedTuple):
    """The bytes of a picture, or the reason why there are none; `name` is its path, or its key in a shard."""

    name: str
    content: bytes
    reason: str = ""


def read_pictures(named: Sequence[str]) -> Iterator[PictureFile]:
    """Yields the pictures of each file, folder or shard pattern in order; what cannot be read comes with a reason."""
    for name in named:
        try:
            if os.path.isdir(name) and not any(entry.endswith(tar_shards.SUFFIX) for entry in os.listdir(name)):
                yield from _read_folder(name)
            elif os.path.isdir(name) or name.endswith(tar_shards.SUFFIX):
                for shard in tar_shards.expand(name):
                    yield from _read_shard(shard)
            else:
                yield _read_file(name)
        except (InputError, OSError) as error:
            yield PictureFile(name, b"", str(error))


def _read_folder(root: str) -> Iterator[PictureFile]:
    n_picture = 0
    for place, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            if not file.startswith(".") and os.path.splitext(file)[1].lower().lstrip(".") in IMAGE_EXTENSIONS:
                n_picture += 1
                yield _read_file(os.path.join(place, file))
    if not n_picture:
        yield PictureFile(root, b"", f"holds neither .tar shards nor pictures ({', '.join(IMAGE_EXTENSIONS)})")


def _read_file(path: str) -> PictureFile:
    if not os.path.exists(path):
        return PictureFile(path, b"", "no such file")
    try:
        with open(path, "rb") as file:
            return PictureFile(path, file.read())
    except OSError as error:
        return PictureFile(path, b"", error.strerror or str(error))


def _read_shard(url: str) -> Iterator[PictureFile]:
    try:
        for sample in tar_shards.read_shard(url):
            content = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
            reason = f"no picture ({', '.join(IMAGE_EXTENSIONS)})" if content is None else sample.get("__refused__", "")
            yield PictureFile(f"{url}/{sample['__key__']}", content or b"", reason)
    except BadSample as error:
        yield PictureFile(url, b"", str(error))
