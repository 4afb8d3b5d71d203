"""Writes index.jsonl beside shards: their counts, the place of every sample, and checksums.

    dalle-ds index "s3://bucket/pairs/{00000..41455}.tar"

Reads every byte once; training then seeks to where it stopped, and notices a shard that was cut, replaced or damaged on
the way. Run it again at will: shards that have not changed are not read again, and after a stop it goes on.
"""

import argparse
import time

from dalle_ds.config import InputError, ReadConfig
from dalle_ds.flags import add_flags, apply_flags

SAVE_SECONDS = 60.0
N_NAMED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", help="a folder, file, brace pattern, s3:// URL or prefix")
    parser.add_argument("--n_worker", type=int, default=2, help="shards that are read at the same time")
    add_flags(parser, ReadConfig(), "read.")


def run(args: argparse.Namespace) -> None:
    from rich.progress import track

    from dalle_ds.config import require
    from dalle_ds.data.index import index_shards, write_index
    from dalle_ds.data.shards import expand

    require(args.n_worker >= 1, f"--n_worker {args.n_worker} must be at least 1")
    config = apply_flags(ReadConfig(), args, "read.")
    urls = expand(args.shards)
    entries, bad = [], []
    n_read, n_samples, n_bytes, saved, last = 0, 0, 0, 0, time.monotonic()
    for url, entry, was_read in track(index_shards(urls, config, args.n_worker), "indexing shards", len(urls)):
        if isinstance(entry, str):
            bad.append(f"{url} ({entry.removeprefix(f'{url}: ')})")
            continue
        n_read, n_samples, n_bytes = n_read + was_read, n_samples + entry.n_samples, n_bytes + entry.n_bytes
        if was_read:
            entries.append((url, entry))
        # A stop loses a minute, not the hours before it.
        if time.monotonic() - last > SAVE_SECONDS:
            write_index(entries[saved:], config)
            saved, last = len(entries), time.monotonic()
    write_index(entries[saved:], config)
    if bad:
        more = f"; and {len(bad) - N_NAMED} more" if len(bad) > N_NAMED else ""
        raise InputError(
            f"{len(bad)} of {len(urls)} shards cannot be indexed: {'; '.join(bad[:N_NAMED])}{more}: "
            "mend or remove them (the others are indexed)"
        )
    print(
        f"{len(urls)} shards, {n_samples:,} samples, {n_bytes:,} bytes; {n_read} read, {len(urls) - n_read} unchanged"
    )
