"""What makes a captioned picture unfit for training (Appendix C), one filter after the other, each with its counter.

A filter gives the reason to drop a candidate, or "" to let it pass; the first one that objects has it in its counter.
None changes a caption or a picture. The paper names its filters for captions that are too short, not English or mostly
boilerplate, and for pictures outside of aspect ratios [1/2, 2]; the others, and the thresholds that it does not give,
are ours.
"""

import contextlib
import io
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial

from PIL import Image

from dalle_ds.config import FilterConfig, require
from dalle_ds.data.boilerplate import boilerplate_share
from dalle_ds.data.duplicates import HASH_BITS, ExactIndex, Fingerprint, NearIndex, fingerprint
from dalle_ds.data.images import DECODE_ERRORS, FORMATS, MAX_PIXELS, BadImage, decode
from dalle_ds.data.languages import LANGUAGE_IDENTIFIERS
from dalle_ds.data.sources import Sample

MAX_WORKERS = 16
LARGE_PIXELS = 16_000_000  # some 130 MB while transparency is put over white
AHEAD_PER_WORKER = 2  # candidates that wait, judged or being judged: what bounds the memory


class Candidate:
    """A sample that is judged; what filters need to know of its picture is worked out once, when first asked for."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.dropped_by = ""
        self.reason = ""
        self.twin: int | None = None  # of a near duplicate: the number, among those kept, of the one it is like

    @property
    def caption(self) -> str:
        return str(self.sample["caption"])

    @cached_property
    def size(self) -> tuple[int, int] | None:
        """Width and height that the header claims, before anything is decoded; None when it does not parse.

        Raises Pillow's DecompressionBombError far above its own limit.
        """
        try:
            with Image.open(io.BytesIO(self.sample["image"]), formats=FORMATS) as image:
                return image.size
        except DECODE_ERRORS:
            return None

    def is_large(self) -> bool:
        """Whether decoding takes so much memory that it is done for one candidate at a time."""
        try:
            width, height = self.size or (0, 0)
        except Image.DecompressionBombError:
            return False  # which is never decoded
        return width * height > LARGE_PIXELS

    @cached_property
    def image(self) -> Image.Image:
        """The decoded picture. Raises BadImage."""
        return decode(self.sample["image"])

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.image)

    def judge(self, judges: "dict[str, Judge]") -> "Candidate":
        """Asks `judges` in order, up to the first that objects; returns the candidate itself."""
        for name, judge in judges.items():
            if not self.dropped_by and (reason := judge(self)):
                self.dropped_by, self.reason = name, reason
        return self


# The reason to drop a candidate, or "".
Judge = Callable[[Candidate], str]


@dataclass(frozen=True)
class Filter:
    """How a filter is made from the settings, and what the report says of it.

    `in_order`: it remembers earlier candidates, so it sees them one by one, in order; the others work in threads.
    """

    summary: str
    make: Callable[[FilterConfig], Judge]
    in_order: bool = False


def too_short(config: FilterConfig) -> Judge:
    def judge(candidate: Candidate) -> str:
        n_words = sum(any(map(str.isalnum, word)) for word in candidate.caption.split())
        if n_words < config.min_words:
            return f"its words are {n_words}, fewer than {config.min_words}"
        n = len(candidate.caption)
        return f"its characters are {n}, fewer than {config.min_characters}" if n < config.min_characters else ""

    return judge


def too_long(config: FilterConfig) -> Judge:
    def judge(candidate: Candidate) -> str:
        n = len(candidate.caption)
        return f"its characters are {n:,}, more than {config.max_characters:,}" if 0 < config.max_characters < n else ""

    return judge


def boilerplate(config: FilterConfig) -> Judge:
    def judge(candidate: Candidate) -> str:
        share = boilerplate_share(candidate.caption) if config.boilerplate_share < 1 else 0.0
        return f"{share:.0%} of the caption is boilerplate" if share > config.boilerplate_share else ""

    return judge


def language(config: FilterConfig) -> Judge:
    names = [name.strip().lower() for name in config.languages.split(",") if name.strip()]
    if not names:
        return lambda candidate: ""
    require(
        config.language_identifier in LANGUAGE_IDENTIFIERS,
        f"language_identifier {config.language_identifier!r} must be one of {', '.join(LANGUAGE_IDENTIFIERS)}",
    )
    identify = LANGUAGE_IDENTIFIERS[config.language_identifier]()

    def judge(candidate: Candidate) -> str:
        found, confidence = identify(candidate.caption)
        if found in names and confidence >= config.language_confidence:
            return ""
        return f"the caption's language is {found or 'unknown'} ({confidence:.0%} sure)"

    return judge


def decompression_bomb(config: FilterConfig) -> Judge:
    require(config.max_pixels <= MAX_PIXELS, f"max_pixels {config.max_pixels:,} must be at most {MAX_PIXELS:,}")

    def judge(candidate: Candidate) -> str:
        try:
            width, height = candidate.size or (0, 0)
        except Image.DecompressionBombError:
            return f"its header claims more than {config.max_pixels:,} pixels"
        claimed = f"its header claims {width:,} x {height:,} pixels"
        return f"{claimed}, more than {config.max_pixels:,}" if width * height > config.max_pixels else ""

    return judge


def aspect_ratio(config: FilterConfig) -> Judge:
    def judge(candidate: Candidate) -> str:
        width, height = candidate.size or (0, 0)
        wide = max(width, height) > config.max_aspect_ratio * min(width, height)
        return f"{width} x {height} pixels are too long" if config.max_aspect_ratio and wide else ""

    return judge


def too_small(config: FilterConfig) -> Judge:
    def judge(candidate: Candidate) -> str:
        # A header that does not parse is for `undecodable` to report.
        small = candidate.size is not None and min(candidate.size) < config.min_side
        return "{} x {} pixels are too few".format(*candidate.size or ()) if small else ""

    return judge


def undecodable(config: FilterConfig) -> Judge:
    def judge(candidate: Candidate) -> str:
        try:
            candidate.image  # noqa: B018
        except BadImage as error:
            return str(error)
        return ""

    return judge


def exact_duplicate(config: FilterConfig) -> Judge:
    index = ExactIndex()

    def judge(candidate: Candidate) -> str:
        if not config.exact_duplicates:
            return ""
        if index.find(candidate.fingerprint):
            return "its pixels are those of an earlier picture"
        index.add(candidate.fingerprint)
        return ""

    return judge


def near_duplicate(config: FilterConfig) -> Judge:
    index = NearIndex(max(0, config.near_duplicate_bits))

    def judge(candidate: Candidate) -> str:
        if config.near_duplicate_bits < 0:
            return ""
        if found := index.find(candidate.fingerprint):
            candidate.twin, bits = found
            return f"{bits} of {HASH_BITS} bits of its hash differ from those of the kept picture {candidate.twin}"
        index.add(candidate.fingerprint)
        return ""

    return judge


class Tally:
    """Counters of candidates: seen, kept, and dropped by each filter."""

    def __init__(self) -> None:
        self.n_seen = 0
        self.dropped: Counter[str] = Counter(dict.fromkeys(FILTERS, 0))

    @property
    def n_kept(self) -> int:
        return self.n_seen - self.dropped.total()

    def add(self, candidate: Candidate) -> None:
        self.n_seen += 1
        if candidate.dropped_by:
            self.dropped[candidate.dropped_by] += 1


def judge_samples(samples: Iterable[Sample], config: FilterConfig, n_worker: int = 1) -> Iterator[Candidate]:
    """Yields every sample as a judged candidate, in order: the verdicts do not depend on `n_worker`, the threads.

    At most 2 * n_worker + 1 candidates are held at a time, and a decoded picture for each thread: one alone, of all
    threads, has more than 16 million pixels.
    """
    require(1 <= n_worker <= MAX_WORKERS, f"n_worker {n_worker} must lie in [1, {MAX_WORKERS}]")
    made = {name: (one.in_order, one.make(config)) for name, one in FILTERS.items()}
    alone = {name: judge for name, (in_order, judge) in made.items() if not in_order}
    in_order = {name: judge for name, (in_order, judge) in made.items() if in_order}
    wants_fingerprint = config.exact_duplicates or config.near_duplicate_bits >= 0
    work = partial(_judge_alone, judges=alone, wants_fingerprint=wants_fingerprint, large=threading.Lock())
    for candidate in _ahead(map(Candidate, samples), work, n_worker):
        yield candidate.judge(in_order)


def _judge_alone(
    candidate: Candidate, judges: dict[str, Judge], wants_fingerprint: bool, large: threading.Lock
) -> Candidate:
    with large if candidate.is_large() else contextlib.nullcontext():
        candidate.judge(judges)
        if wants_fingerprint and not candidate.dropped_by:
            candidate.fingerprint  # noqa: B018  # in this thread, not in the one that compares
        # Candidates wait for their turn; pixels are worth a thousand captions.
        candidate.__dict__.pop("image", None)
    return candidate


def _ahead(
    candidates: Iterable[Candidate], work: Callable[[Candidate], Candidate], n_worker: int
) -> Iterator[Candidate]:
    waiting: deque[Future[Candidate]] = deque()
    workers = ThreadPoolExecutor(n_worker, thread_name_prefix="filter")
    try:
        for candidate in candidates:
            waiting.append(workers.submit(work, candidate))
            if len(waiting) > AHEAD_PER_WORKER * n_worker:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        workers.shutdown(wait=True, cancel_futures=True)


def default_workers() -> int:
    """Threads for decoding: the cores, at most 16."""
    return min(MAX_WORKERS, os.cpu_count() or 1)


# Name -> filter, in the order that they are asked: what is cheap comes first.
FILTERS: dict[str, Filter] = {
    "too_long": Filter("captions longer than max_characters", too_long),
    "too_short": Filter("captions of fewer words or characters than min_words, min_characters", too_short),
    "boilerplate": Filter('captions that are mostly such as "photographed on <date>"', boilerplate),
    "language": Filter("captions in none of languages", language),
    "decompression_bomb": Filter("pictures whose header claims more than max_pixels", decompression_bomb),
    "aspect_ratio": Filter("pictures longer than max_aspect_ratio: a square crop would lose objects", aspect_ratio),
    "too_small": Filter("pictures with fewer pixels on a side than min_side", too_small),
    "undecodable": Filter("pictures that do not decode, or are cut short", undecodable),
    "exact_duplicate": Filter("pictures with the pixels of an earlier one", exact_duplicate, in_order=True),
    "near_duplicate": Filter("pictures much like an earlier one, by a perceptual hash", near_duplicate, in_order=True),
}
