"""Train the caption tokenizer (byte-pair encoding) on the captions of a data set.

    dalle-ds train-tokenizer --data data/scenes/train --out runs/tokenizer.model --vocab_size 1024

The data is a folder of pictures with captions beside them, a folder of .tar shards, or a shard pattern. It is read
once, as a stream; of more captions than --max_captions that many are drawn, evenly over all, and only those are held.
"""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dalle_ds.config import InputError, ReadConfig, TokenizerConfig, require
from dalle_ds.flags import add_flags, apply_flags

if TYPE_CHECKING:
    from dalle_ds.data.skips import SkipLog
    from dalle_ds.data.sources import Source

# Captions that the mean length is measured on.
N_MEASURED = 10_000
# Half a gigabyte or so; merges hardly change beyond some millions.
MAX_CAPTIONS = 4_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="captioned pictures: a folder, or shards (train-{000..009}.tar)")
    parser.add_argument("--out", required=True, help="the model file to write")
    parser.add_argument(
        "--max_captions", type=int, default=MAX_CAPTIONS, help=f"captions held in memory (default: {MAX_CAPTIONS:,})"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw, where there are more (default: 0)")
    add_flags(parser, TokenizerConfig())
    add_flags(parser, ReadConfig(), "read.")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from dalle_ds.data.skips import SkipLog
    from dalle_ds.data.sources import open_source
    from dalle_ds.tokenizer import train_tokenizer

    config = apply_flags(TokenizerConfig(), args)
    require(args.max_captions >= 1, f"--max_captions {args.max_captions} must be at least 1")
    require(args.seed >= 0, f"--seed {args.seed} must not be negative")
    if Path(args.out).is_dir():
        raise InputError(f"--out {args.out} is a folder: give the file to write, such as {args.out}/tokenizer.model")
    source = open_source(args.data, apply_flags(ReadConfig(), args, "read."))
    log = SkipLog()
    first: list[str] = []
    n_captions = 0

    def captions() -> Iterator[str]:
        nonlocal n_captions
        for caption in read_captions(source, log):
            n_captions += 1
            if len(first) < N_MEASURED:
                first.append(caption)
            yield caption

    tokenizer = train_tokenizer(captions(), config, args.out, max_captions=args.max_captions, seed=args.seed)
    if log.n_skipped:
        print(f"warning: {log.summary()}", flush=True)
    held = f", {args.max_captions:,} of them drawn" if n_captions > args.max_captions else ""
    mean = sum(len(tokenizer.encode(caption)) for caption in first) / len(first)
    print(
        f"{args.out}: {tokenizer.vocab_size:,} pieces (asked for {config.vocab_size:,}) "
        f"from {n_captions:,} captions{held}, {mean:.1f} tokens a caption",
        flush=True,
    )


def read_captions(source: "Source", log: "SkipLog") -> Iterator[str]:
    """Yields every caption of the source, with a progress bar over its parts."""
    from rich.progress import track

    for part in track(source.parts, description="reading captions"):
        for sample in source.read(part, log):
            yield sample["caption"]
