"""Captioned pictures from wherever they are: webdataset shards, or a folder of pictures with captions beside them.

A source is a list of parts (shards, or some pictures of a folder) and a way to read any slots of one. A slot is a
sample, {"key", "image": bytes, "caption", "truth": dict or None, "origin": file or shard}, or what stands where one
cannot be used, {"key", "origin", "bad": reason}: so that a sample's number in its part never changes.
"""

import functools
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dalle_ds.config import InputError, ReadConfig
from dalle_ds.data import shards as tar_shards
from dalle_ds.data.failure_budget import FailureBudget
from dalle_ds.data.index import find_entries, read_index
from dalle_ds.data.mixture import is_mixture, read_mixture
from dalle_ds.data.refusals import too_large
from dalle_ds.data.skips import BadSample, SkipLog

Sample = dict[str, Any]

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
PICTURES_PER_PART = 64
# The one character that a path cannot hold.
PATH_SEPARATOR = "\0"
NO_CAPTION, NO_PICTURE = "no caption", f"no picture ({', '.join(IMAGE_EXTENSIONS)})"
CAPTION_REMEDY = 'put a <key>.txt beside each picture, or a "caption" in its <key>.json'
PICTURE_REMEDY = "give shards of .png, .jpg or .webp with .txt"


@dataclass(frozen=True)
class Source:
    """Parts, how to read slots `begin` to `end` of one (None: to its end), and how many slots each of them has.

    After the last slot of a part there may come one more, bad and without a key: the fault that ends the part early.
    `sets` is of a mixture: how many of the parts each set has, and its weight.
    """

    parts: list[str]
    read_slots: Callable[[str, int, int | None], Generator[Sample, None, None]]
    count: Callable[[list[str]], Sequence[int]]
    sets: tuple[tuple[int, float], ...] = ()

    def read(self, part: str, log: SkipLog | None = None) -> Iterator[Sample]:
        """Yields the samples of `part`, in an order that is always the same; bad ones go to the log."""
        for slot in self.read_slots(part, 0, None):
            if "bad" not in slot:
                yield slot
            elif log is not None:
                log.add(slot["key"], slot["origin"], slot["bad"])

    @functools.cached_property
    def part_lens(self) -> list[int]:
        """Slots of each part."""
        return list(self.count(self.parts))


def open_source(data: str, config: ReadConfig | None = None) -> Source:
    """The source that `data` names: a folder of pictures, a folder of shards, a shard pattern, or a mixture of such.

    Reads up to the first good sample, so that data of the wrong kind is refused before work starts. Raises InputError.
    """
    if is_mixture(data):
        entries = read_mixture(data)
        sources = [open_source(entry.data, config) for entry in entries]
        return mixed_source(sources, [entry.weight for entry in entries])
    source = SOURCES[pick_source(data)](data, config or ReadConfig())
    next(source.read(source.parts[0]), None)
    return source


def mixed_source(sources: Sequence[Source], weights: Sequence[float]) -> Source:
    """All the parts of the sources, which the Reader draws from by weight."""
    owners = {part: source for source in sources for part in source.parts}

    def count(parts: list[str]) -> list[int]:
        lens = {part: n for source in sources for part, n in zip(source.parts, source.part_lens, strict=True)}
        return [lens[part] for part in parts]

    return Source(
        [part for source in sources for part in source.parts],
        lambda part, begin, end: owners[part].read_slots(part, begin, end),
        count,
        tuple((len(source.parts), weight) for source, weight in zip(sources, weights, strict=True)),
    )


def shards(data: str, config: ReadConfig) -> Source:
    """The captioned pictures of webdataset shards; `truth` is the parsed .json."""
    fatal = {NO_PICTURE: ("a picture", PICTURE_REMEDY), NO_CAPTION: ("a caption", CAPTION_REMEDY)}
    return shard_source(data, config, parse_picture, fatal)


def shard_source(
    data: str, config: ReadConfig, parse: Callable[[dict[str, Any]], Sample], fatal: dict[str, tuple[str, str]]
) -> Source:
    """The source of the shards that `data` names.

    `parse` turns what a shard holds of a sample (see shards.read_shard) into its fields, or raises BadSample. A shard
    that is read whole, and whose samples are all bad for the same one of the reasons in `fatal`, raises InputError:
    reason -> what they lack, what to do. So does one shard too many whose bytes cannot be had (`failed_shards`).
    """
    urls = tar_shards.expand(data)
    indexed = functools.cache(lambda: find_entries(urls, config))
    entries = functools.cache(lambda: read_index(urls, config))
    budget = FailureBudget(config.failed_shards)

    def read_raw(url: str, begin: int, end: int | None) -> Iterator[dict[str, Any]]:
        if begin == 0 and end is None:
            return tar_shards.read_shard(url, entry=indexed().get(url), config=config)
        entry = entries()[url]
        # A local shard that was only scanned has no checksums: nothing to read ahead and check.
        checked = entry if entry.sha256 else None
        stop = None if end is None or end >= entry.n_samples or checked is None else entry.offsets[end]
        samples = tar_shards.read_shard(url, entry.offsets[begin], checked, end=stop, config=config)
        return islice(samples, None if end is None else end - begin)

    def read_slots(url: str, begin: int, end: int | None) -> Generator[Sample, None, None]:
        reasons: set[str] = set()
        extensions: set[str] = set()
        raw_samples = read_raw(url, begin, end)
        while True:
            try:
                raw = next(raw_samples)
            except StopIteration:
                break
            except tar_shards.BrokenShard as fault:
                if isinstance(fault, tar_shards.UnreadableShard):
                    budget.add(url, str(fault))
                yield {"key": "", "origin": url, "bad": str(fault)}
                return
            extensions.update(name for name in raw if not name.startswith("__"))
            try:
                if "__refused__" in raw:
                    raise BadSample(raw["__refused__"])
                slot = {"key": raw["__key__"], **parse(raw), "origin": url}
                reasons.add("")
            except BadSample as error:
                slot = {"key": raw["__key__"], "origin": url, "bad": str(error)}
                reasons.add(str(error))
            yield slot
        if begin == 0 and end is None and not reasons:
            yield {"key": "", "origin": url, "bad": "the tar is empty"}
        if begin == 0 and end is None and len(reasons) == 1 and (reason := reasons.pop()) in fatal:
            found = f"its members are {', '.join(f'.{name}' for name in sorted(extensions))}"
            lack, remedy = fatal[reason]
            raise InputError(f"{url}: no sample has {lack} ({found}): {remedy}")

    return Source(urls, read_slots, lambda parts: [entries()[url].n_samples for url in parts])


def parse_picture(raw: dict[str, Any]) -> Sample:
    """{"image", "caption", "truth"} of a sample of a shard. Raises BadSample."""
    image = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
    truth = parse_truth(raw.get("json"))
    caption = parse_caption(raw.get("txt"), truth)
    if image is None:
        raise BadSample(NO_PICTURE)
    return {"image": image, "caption": caption, "truth": truth}


def folder(root: str, config: ReadConfig) -> Source:
    """Pictures in a folder, each with the .txt, or the "caption" of the .json, of its own name beside it.

    A part is the folder and some pictures' paths below it, joined by NUL. The key is the path without its extension.
    """

    def read_slots(part: str, begin: int, end: int | None) -> Generator[Sample, None, None]:
        root, *names = part.split(PATH_SEPARATOR)
        for name in names[begin:end]:
            path = os.path.join(root, name)
            key = os.path.splitext(name)[0].replace(os.sep, "/")
            try:
                yield {"key": key, **_read_picture(path), "origin": path}
            except BadSample as error:
                yield {"key": key, "origin": path, "bad": str(error)}

    return Source(divide_folder(root), read_slots, lambda parts: [part.count(PATH_SEPARATOR) for part in parts])


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
    except (ValueError, RecursionError) as error:
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
        raise BadSample(NO_CAPTION)
    if not caption.strip():
        raise BadSample("the caption is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise BadSample("the caption is no text: it holds half of a surrogate pair")  # JSON can say such
    return caption.strip()


def _read_picture(path: str) -> Sample:
    """{"image", "caption", "truth"} of a picture file and the files beside it. Raises BadSample."""
    stem = os.path.splitext(path)[0]
    truth = parse_truth(_read_if_there(f"{stem}.json"))
    caption = parse_caption(_read_if_there(f"{stem}.txt"), truth)
    image = _read_if_there(path)
    if image is None:
        raise BadSample("the picture is gone")
    return {"image": image, "caption": caption, "truth": truth}


def _read_if_there(path: str) -> bytes | None:
    if not os.path.isfile(path):
        return None
    if reason := too_large(os.path.basename(path), os.path.getsize(path)):
        raise BadSample(reason)
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


# Name -> what makes a source of the data that the user named.
SOURCES: dict[str, Callable[[str, ReadConfig], Source]] = {"shards": shards, "folder": folder}
