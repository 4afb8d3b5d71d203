"""Write clean shards out of captioned pictures, and a report of what was dropped (Appendix C of the paper).

    dalle-ds filter 'raw/{00000..00999}.tar' data/clean --min_side 256

IN is a folder of pictures with captions beside them, a folder of .tar shards, a shard pattern (also s3://), or a .json
of sets. OUT is made whole or not at all: 00000.tar ..., report.json, report.html (how many each filter dropped, with
examples), dropped.jsonl (every one, with the reason) and skipped.jsonl (what could not be read). Captions and pictures
go through as they are; the same data and settings make the same bytes.

Of samples alike the first stays. What was seen takes some 350 bytes of memory a picture; to divide the work, give each
machine some of the shards and a folder of its own: duplicates are then found among those.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_ds.config import FULL_DISK, FilterConfig, InputError, ReadConfig, require
from dalle_ds.flags import add_flags, apply_flags

if TYPE_CHECKING:
    from dalle_ds.data.filters import Candidate, Tally
    from dalle_ds.data.skips import SkipLog
    from dalle_ds.data.sources import Source
    from dalle_ds.data.writer import ShardWriter
    from dalle_ds.reporting.filter_page import Dropped

REPORT_JSON = "report.json"  # what tells a folder of ours from others
THUMBNAIL = 168  # pixels
MAX_CAPTION = 160  # characters of a caption in the report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="IN", help="captioned pictures: a folder, or shards (raw-{000..009}.tar)")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of clean shards to write")
    parser.add_argument("--samples_per_shard", type=int, default=10_000, help="samples in a shard (default: 10000)")
    parser.add_argument("--n_worker", type=int, default=0, help="threads that judge (default: one a core, at most 16)")
    parser.add_argument("--n_examples", type=int, default=6, help="examples in the report for each filter (default: 6)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier `filter` wrote to OUT")
    add_flags(parser, FilterConfig())
    add_flags(parser, ReadConfig(), "read.")


def run(args: argparse.Namespace) -> None:
    from dalle_ds.data.sources import open_source

    config = apply_flags(FilterConfig(), args)
    require(args.n_examples >= 0, f"--n_examples {args.n_examples} must not be negative")
    check_folder(args.out, args.overwrite)
    source = open_source(args.data, apply_flags(ReadConfig(), args, "read."))
    out = args.out.resolve()
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        said = filter_samples(source, staging, config, args)
        publish(staging, out)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise InputError(
                f"{args.out}: the disk is full; free some space or write elsewhere (nothing was kept)"
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{args.out}: {said}; see {args.out / 'report.html'}", flush=True)


def check_folder(out: Path, overwrite: bool) -> None:
    """Raises InputError when `out` holds anything, unless `overwrite` and an earlier `filter` wrote it."""
    require(not out.exists() or out.is_dir(), f"{out} is a file: name a folder")
    require(not out.is_mount(), f"{out} is where a disk is mounted: name a folder in it")
    held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if held and not overwrite:
        raise InputError(f"{out} is not empty (it holds {held[0]}): name another folder, or give --overwrite")
    if held and REPORT_JSON not in held:
        raise InputError(f"{out} holds {held[0]} but no {REPORT_JSON}, so it is not ours to overwrite: name another")


def publish(staging: Path, out: Path) -> None:
    """Puts the finished folder in the place of `out`, in one move."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def filter_samples(source: "Source", folder: Path, config: FilterConfig, args: argparse.Namespace) -> str:
    """Writes shards, lists and report into `folder`; returns one line that says how many were kept."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from dalle_ds.data.filters import Tally, default_workers, judge_samples
    from dalle_ds.data.skips import SkipLog
    from dalle_ds.data.writer import ShardWriter

    tally, log = Tally(), SkipLog(folder / "skipped.jsonl")
    examples: dict[str, list[tuple[Dropped, int | None]]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns) as progress,
        ShardWriter(folder, args.samples_per_shard) as writer,
        open(folder / "dropped.jsonl", "w", encoding="utf-8") as dropped,
    ):
        task = progress.add_task("parts read", total=len(source.parts))
        samples = read_all(source, log, lambda: progress.advance(task))
        for candidate in judge_samples(samples, config, args.n_worker or default_workers()):
            tally.add(candidate)
            if candidate.dropped_by:
                dropped.write(dropped_line(candidate))
                held = examples.setdefault(candidate.dropped_by, [])
                if len(held) < args.n_examples:
                    held.append((as_example(candidate), candidate.twin))
            else:
                writer.write(as_members(candidate))
            progress.update(task, description=f"kept {tally.n_kept:,} of {tally.n_seen:,}")
    if not tally.n_kept:
        name, n = tally.dropped.most_common(1)[0]
        why = f" ({n:,} by {name})" if n else f", {log.first or 'there is none'}"
        raise InputError(
            f"{args.data}: not one of {tally.n_seen:,} samples passed the filters{why}; nothing is written"
        )
    write_report(folder, config, args, tally, log, examples, writer)
    log.path = args.out / "skipped.jsonl"  # where it will be
    return f"kept {tally.n_kept:,} of {tally.n_seen:,} samples" + (f", {log.summary()}" if log.n_skipped else "")


def read_all(source: "Source", log: "SkipLog", advance: Any) -> Iterator[dict[str, Any]]:
    """Yields the samples of every part in turn."""
    for part in source.parts:
        yield from source.read(part, log)
        advance()


def as_members(candidate: "Candidate") -> dict[str, bytes]:
    """The files of a sample in a shard: the bytes of the picture as they came, the caption, and the JSON if any."""
    content, truth = candidate.sample["image"], candidate.sample["truth"]
    kind = "jpg" if content[:2] == b"\xff\xd8" else "webp" if content[:4] == b"RIFF" else "png"
    members = {kind: content, "txt": candidate.caption.encode()}
    return members if truth is None else {**members, "json": json.dumps(truth).encode()}


def dropped_line(candidate: "Candidate") -> str:
    sample = candidate.sample
    line = {
        "key": sample["key"],
        "origin": sample["origin"],
        "filter": candidate.dropped_by,
        "reason": candidate.reason,
    }
    return json.dumps(line) + "\n"


def as_example(candidate: "Candidate") -> "Dropped":
    from dalle_ds.reporting.filter_page import Dropped

    sample, caption = candidate.sample, candidate.caption
    return Dropped(
        key=sample["key"],
        origin=sample["origin"],
        caption=caption if len(caption) <= MAX_CAPTION else f"{caption[:MAX_CAPTION]} ...",
        reason=candidate.reason,
        picture=thumbnail(sample["image"]),
    )


def thumbnail(content: bytes) -> str:
    """The picture, small, as a data URI; empty when it does not decode."""
    import base64
    import io

    from dalle_ds.data.images import BadImage, decode

    try:
        image = decode(content)
    except BadImage:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_report(
    folder: Path,
    config: FilterConfig,
    args: argparse.Namespace,
    tally: "Tally",
    log: "SkipLog",
    examples: "dict[str, list[tuple[Dropped, int | None]]]",
    writer: "ShardWriter",
) -> None:
    from dalle_ds.data.filters import FILTERS
    from dalle_ds.reporting.filter_page import FilterReport, FilterRow, write_filter_report

    for shown, twin in (pair for pairs in examples.values() for pair in pairs):
        shown.twin = "" if twin is None else thumbnail(kept_picture(folder, twin, writer.samples_per_shard))
    rows = [
        FilterRow(
            name=name,
            summary=one.summary,
            dropped=tally.dropped[name],
            examples=[shown for shown, _ in examples.get(name, [])],
        )
        for name, one in FILTERS.items()
    ]
    report = FilterReport(
        data=args.data,
        settings=dataclasses.asdict(config),
        read=tally.n_seen,
        kept=tally.n_kept,
        shards=writer.n_shard,
        filters=rows,
        unreadable=log.n_skipped,
        unreadable_reasons=dict(log.reasons),
    )
    write_filter_report(folder, report)


def kept_picture(folder: Path, number: int, samples_per_shard: int) -> bytes:
    """The bytes of a picture that was kept, out of the shard that holds it."""
    from itertools import islice

    from dalle_ds.data.shards import read_shard

    shard, index = divmod(number, samples_per_shard)
    sample = next(islice(read_shard(str(folder / f"{shard:05d}.tar")), index, None))
    content: bytes = next(sample[kind] for kind in ("jpg", "png", "webp") if kind in sample)
    return content
