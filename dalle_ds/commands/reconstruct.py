"""Send pictures through a trained dVAE: each side by side with what its tokens give back, and a grid of them.

    dalle-ds reconstruct --dvae runs/dvae --out rebuilt cat.jpg photographs/ data/scenes/validation

Pictures are files, folders, or shards; captions are not needed. Each is cropped to the largest square around its centre
and resized to what the dVAE takes. Writes 0000-cat.png ... (left the picture, right the rebuilding) and grid.png, and
prints PSNR and SSIM. What is no picture is named and left out.
"""

import argparse
from typing import TYPE_CHECKING, Any

from dalle_ds.config import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Pictures on grid.png; white pixels between a picture and its rebuilding.
N_GRID, GAP = 64, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", metavar="PICTURES", help="picture files, folders of them, or shards")
    parser.add_argument("--dvae", required=True, help="run folder of `dalle-ds train-dvae`")
    parser.add_argument("--out", required=True, help="folder to write 0000-NAME.png ... and grid.png to")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures rebuilt at once (default: 16)")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    import numpy as np
    import torch
    from rich.progress import Progress

    from dalle_ds.evaluation.reconstruction import psnr, ssim
    from dalle_ds.models.weights import load_dvae
    from dalle_ds.reporting.grid import pairs_grid

    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    if args.batch_size < 1:
        raise InputError(f"--batch_size {args.batch_size} must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dvae = load_dvae(args.dvae).to(device)
    size = dvae.config.image_size
    left_out: list[str] = []
    rows: list[tuple[str, float, float]] = []
    shown: list[Any] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("rebuilding pictures", total=None)
        for names, pictures in _read_batches(args.pictures, size, args.batch_size, left_out):
            images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(device)
            decoded = dvae.decode(dvae.encode(images))
            rebuilt = decoded.permute(0, 2, 3, 1).cpu().numpy()
            out.mkdir(parents=True, exist_ok=True)
            files = [f"{len(rows) + i:04d}-{Path(name).stem}.png" for i, name in enumerate(names)]
            for file, *pair in zip(files, pictures, rebuilt, strict=True):
                _save_pair(pair, out / file)
            rows += list(zip(files, psnr(images, decoded).tolist(), ssim(images, decoded).tolist(), strict=True))
            shown += list(zip(pictures, rebuilt, strict=True))[: N_GRID - len(shown)]
            progress.update(task, advance=len(names), description=f"rebuilt {len(rows):,} pictures")
    for line in left_out:
        print(f"warning: left out {line}", flush=True)
    if not rows:
        raise InputError(f"not one of {len(left_out)} can be rebuilt; name picture files, a folder of them, or shards")
    originals, rebuildings = zip(*shown, strict=True)
    pairs_grid(originals, rebuildings, scale=max(1, 128 // size)).save(out / "grid.png")
    _print_table(rows)
    print(f"{out / 'grid.png'}: {len(shown)} of {len(rows)} pictures above their rebuildings", flush=True)


def _read_batches(
    named: list[str], size: int, batch_size: int, left_out: list[str]
) -> "Iterator[tuple[list[str], list[Any]]]":
    """Yields names and uint8 [size, size, 3] of the pictures; adds a line for each that cannot be used."""
    from dalle_ds.data.images import BadImage, centre_crop, decode
    from dalle_ds.data.picture_files import read_pictures

    names: list[str] = []
    pictures: list[Any] = []
    for found in read_pictures(named):
        try:
            if found.reason:
                raise BadImage(found.reason)
            pictures.append(centre_crop(decode(found.content), size))
        except BadImage as error:
            left_out.append(f"{found.name}: {error}")
            continue
        names.append(found.name)
        if len(names) == batch_size:
            yield names, pictures
            names, pictures = [], []
    if names:
        yield names, pictures


def _save_pair(pair: list[Any], path: Any) -> None:
    import numpy as np
    from PIL import Image

    left, right = pair
    gap = np.full((len(left), GAP, 3), 255, np.uint8)
    Image.fromarray(np.concatenate([left, gap, right], axis=1)).save(path)


def _print_table(rows: list[tuple[str, float, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="picture against rebuilding", show_footer=True)
    means = [sum(values) / len(rows) for values in ([row[1] for row in rows], [row[2] for row in rows])]
    table.add_column("picture", f"mean of {len(rows)}", overflow="fold")
    table.add_column("PSNR (dB)", f"{means[0]:.2f}", justify="right")
    table.add_column("SSIM", f"{means[1]:.4f}", justify="right")
    for name, decibel, similarity in rows:
        table.add_row(name, f"{decibel:.2f}", f"{similarity:.4f}")
    Console().print(table)
