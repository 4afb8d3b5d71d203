"""Captioned pictures from wherever they are: webdataset shards, or a folder of pictures with captions beside them.

A source is a list of parts (what ranks divide among themselves and epochs permute) and a way to read one.
Every sample is {"key", "image": bytes, "caption", "truth": dict or None, "origin": file or shard}.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dalle_ds.config import InputError
from dalle_ds.data import shards as tar_shards
from dalle_ds.data.skips import BadSample, SkipLog

Sample = dict[str, Any]

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
# Small enough that a modest folder still divides evenly over ranks.
PICTURES_PER_PART = 64
# The one character that a path cannot hold.
PATH_SEPARATOR = "\0"


@dataclass(frozen=True)
class Source:
    """Parts, and a function that yields the samples of one; what it leaves out goes to the log it is given."""

    parts: list[str]
    read_part: Callable[[str, SkipLog], Iterator[Sample]]

    def read(self, part: str, log: SkipLog | None = None) -> Iterator[Sample]:
        """Yields the samples of `part`, in an order that is always the same."""
        return self.read_part(part, SkipLog() if log is None else log)


def open_source(data: str) -> Source:
    """The source that `data` names: a folder of pictures, a folder of shards, or a shard pattern.

    Reads up to the first good sample, so that data of the wrong kind is refused before work starts. Raises InputError.
    """
    name = pick_source(data)
    source = Source(DIVIDERS[name](data), SOURCES[name])
    next(source.read(source.parts[0]), None)
    return source


def shards(url: str, log: SkipLog) -> Iterator[Sample]:
    """Yields the captioned pictures of one shard; `truth` is the parsed .json.

    Raises InputError when the whole shard holds no caption, or no picture.
    """
    n_seen, n_captions, n_pictures, whole = 0, 0, 0, True
    extensions: set[str] = set()
    raw_samples = tar_shards.read_shard(url)
    while True:
        try:
            raw = next(raw_samples)
        except StopIteration:
            break
        except tar_shards.BrokenShard as fault:
            log.add("", url, str(fault))
            whole = False
            break
        n_seen += 1
        extensions.update(name for name in raw if not name.startswith("__"))
        image = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
        n_pictures += image is not None
        try:
            truth = parse_truth(raw.get("json"))
            caption = parse_caption(raw.get("txt"), truth)
            n_captions += 1
            if image is None:
                raise BadSample(f"no picture ({', '.join(IMAGE_EXTENSIONS)})")
        except BadSample as error:
            log.add(raw["__key__"], url, str(error))
            continue
        yield {"key": raw["__key__"], "image": image, "caption": caption, "truth": truth, "origin": url}
    if whole and n_seen:
        found = f"its members are {', '.join(f'.{name}' for name in sorted(extensions))}"
        if not n_pictures:
            raise InputError(f"{url}: no sample has a picture ({found}): give shards of .png, .jpg or .webp with .txt")
        if not n_captions:
            raise InputError(
                f"{url}: no sample has a caption ({found}): put a <key>.txt beside each picture, "
                'or a "caption" in its <key>.json'
            )


def folder(part: str, log: SkipLog) -> Iterator[Sample]:
    """Yields some pictures of a folder, each with the .txt, or the "caption" of the .json, of its own name beside it.

    `part` is the folder and the pictures' paths below it, joined by NUL. The key is the path without its extension.
    """
    root, *names = part.split(PATH_SEPARATOR)
    for name in names:
        path = os.path.join(root, name)
        stem = os.path.splitext(path)[0]
        key = os.path.splitext(name)[0].replace(os.sep, "/")
        try:
            truth = parse_truth(_read_if_there(f"{stem}.json"))
            caption = parse_caption(_read_if_there(f"{stem}.txt"), truth)
            image = _read_if_there(path)
            if image is None:
                raise BadSample("the picture is gone")
        except BadSample as error:
            log.add(key, path, str(error))
            continue
        yield {"key": key, "image": image, "caption": caption, "truth": truth, "origin": path}


def divide_folder(root: str) -> list[str]:
    """The parts of a folder of pictures. Raises InputError when not one picture has a caption file beside it."""
    names, stems = [], set()
    for place, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            stem, extension = os.path.splitext(os.path.join(place, file))
            if file.startswith("."):
                continue
            if extension.lower().lstrip(".") in IMAGE_EXTENSIONS:
                names.append(os.path.relpath(os.path.join(place, file), root))
            elif extension in (".txt", ".json"):
                stems.add(os.path.relpath(stem, root))
    if not any(os.path.splitext(name)[0] in stems for name in names):
        raise InputError(
            f"{root}: {len(names)} pictures, none with a caption: put cat.txt beside cat.jpg, "
            'or a cat.json that holds a "caption"'
        )
    return [
        PATH_SEPARATOR.join([root, *names[start : start + PICTURES_PER_PART]])
        for start in range(0, len(names), PICTURES_PER_PART)
    ]


def parse_truth(content: bytes | None) -> dict[str, Any] | None:
    """The JSON object in `content`, or None when there is none. Raises BadSample when it is no JSON object."""
    if content is None:
        return None
    try:
        truth = json.loads(content)
    except ValueError as error:
        raise BadSample(f"the .json does not parse ({error})") from None
    if not isinstance(truth, dict):
        raise BadSample("the .json holds no object")
    return truth


def parse_caption(content: bytes | None, truth: dict[str, Any] | None) -> str:
    """The caption in a .txt, else the "caption" of the JSON. Raises BadSample when there is none or it is empty."""
    try:
        # Editors on Windows put a byte order mark first.
        caption = (truth or {}).get("caption") if content is None else content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f"the caption is not UTF-8 (byte {error.start})") from None
    if not isinstance(caption, str):
        raise BadSample("no caption")
    if not caption.strip():
        raise BadSample("the caption is empty")
    return caption.strip()


def _read_if_there(path: str) -> bytes | None:
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return file.read()


def pick_source(data: str) -> str:
    """The name in SOURCES of what `data` is. Raises InputError for a folder that holds nothing to read."""
    if not data or not os.path.isdir(data) or _holds_shards(data):
        return "shards"
    for place, folders, names in os.walk(data):
        if _holds_shards(place):
            raise InputError(f"{data}: its shards are in folders below it; give one of those, such as {place}")
        if any(os.path.splitext(name)[1].lower().lstrip(".") in IMAGE_EXTENSIONS for name in names):
            return "folder"
        folders.sort()
    raise InputError(f"{data}: holds neither .tar shards nor pictures ({', '.join(IMAGE_EXTENSIONS)})")


def _holds_shards(place: str) -> bool:
    return any(name.endswith(tar_shards.SUFFIX) for name in os.listdir(place))


# Name -> generator of the samples of one part.
SOURCES: dict[str, Callable[[str, SkipLog], Iterator[Sample]]] = {"shards": shards, "folder": folder}
# Name -> how the data the user named becomes parts.
DIVIDERS: dict[str, Callable[[str], list[str]]] = {"shards": tar_shards.expand, "folder": divide_folder}
