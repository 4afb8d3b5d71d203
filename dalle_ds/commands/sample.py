"""Draw pictures for captions: PNG files and a captioned grid.

    dalle-ds sample --prior runs/prior --out pictures "a large red circle in the top left" "a blue star"

`--captions FILE` reads one caption a line. A picture depends on its caption's number, its index and --seed alone.
"""

import argparse

from dalle_ds.config import InputError, SamplingConfig
from dalle_ds.flags import add_flags, apply_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("caption", nargs="*", help="captions to draw")
    parser.add_argument("--captions", help="file with one caption a line")
    parser.add_argument("--prior", required=True, help="run folder of `dalle-ds train-prior`")
    parser.add_argument("--dvae", help="run folder of the dVAE (default: the one the prior was trained with)")
    parser.add_argument("--out", required=True, help="folder to write 000-00.png ..., grid.png and captions.json to")
    parser.add_argument("--n", type=int, default=4, help="pictures for each caption (default: 4)")
    parser.add_argument("--last_weights", action="store_true", help="the last weights of the prior, not the averaged")
    add_flags(parser, SamplingConfig())


def run(args: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    from PIL import Image

    from dalle_ds.generation.pictures import Painter
    from dalle_ds.reporting.grid import make_grid

    config = apply_flags(SamplingConfig(), args)
    captions = list(args.caption)
    if args.captions:
        try:
            captions += [line.strip() for line in Path(args.captions).read_text().splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise InputError(f"--captions {args.captions} is no UTF-8 text file") from None
    if not captions:
        raise InputError('no captions: give some in quotes, "a red circle", or a file with --captions')
    if args.n < 1:
        raise InputError(f"--n {args.n} must be at least 1")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    painter = Painter.load(args.prior, args.dvae, averaged=not args.last_weights)
    repeated = [caption for caption in captions for _ in range(args.n)]
    pictures = painter.paint(repeated, config)
    out.mkdir(parents=True, exist_ok=True)
    names = []
    for i, picture in enumerate(pictures):
        names.append(f"{i // args.n:03d}-{i % args.n:02d}.png")
        Image.fromarray(picture).save(out / names[-1])
    scale = max(1, 128 // pictures[0].shape[0])
    make_grid(pictures, repeated, columns=max(args.n, 4 // args.n * args.n), scale=scale).save(out / "grid.png")
    listing = [{"file": name, "caption": caption} for name, caption in zip(names, repeated, strict=True)]
    (out / "captions.json").write_text(json.dumps(listing, indent=2) + "\n")
    print(f"{out / 'grid.png'}: {len(pictures)} pictures for {len(captions)} captions", flush=True)
