"""Measure how often a picture shows what its caption says; or, with --stage dvae, what a dVAE keeps of pictures.

    dalle-ds evaluate --prior runs/prior --data data/scenes/held_out
    dalle-ds evaluate --stage dvae --dvae runs/dvae --data data/scenes/validation --lpips alexnet.pth alex.pth

Stage prior needs scenes of `dalle-ds make-scenes`, whose truth is known; one picture is drawn for each caption and
shape, colour, place and relation are read back by a program (no learning), with the chance level beside them.

Stage dvae takes any captioned pictures, and never looks at the captions: PSNR, SSIM, codebook use, LPIPS where weights
are given, and reconstruction, KL and ELBO in nats and bits a dimension for three decoders. "relaxed" is the training
objective with a KL weight of 1, at the temperature training ended with, and at --temperature where given: no bound.
"drawn" takes its tokens from the encoder's distribution, "likeliest" takes the likeliest ones: both are lower bounds of
the discrete model. --batch_size is 16 here, and a picture's noise depends on --seed and its number alone.

Both write evaluation.json and pictures into the run folder; `dalle-ds report` shows them.
"""

import argparse
from typing import TYPE_CHECKING, Any

from dalle_ds.config import InputError, SamplingConfig, require
from dalle_ds.flags import add_flags, apply_flags

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from dalle_ds.data.skips import SkipLog
    from dalle_ds.evaluation.reconstruction import Meter

# Pictures measured and shown unless a flag says otherwise.
N_CAPTIONS, N_CAPTIONS_SHOWN = 500, 48
N_PICTURES, N_PICTURES_SHOWN, PICTURES_AT_ONCE = 1_000, 8, 16
# Flags that mean something in one stage alone.
PRIOR_FLAGS, DVAE_FLAGS = ("prior", "top_k", "top_p", "guidance"), ("lpips",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", choices=("prior", "dvae"), default="prior", help="what to measure (default: prior)")
    parser.add_argument("--prior", help="run folder of `dalle-ds train-prior`; needed for stage prior")
    parser.add_argument("--dvae", help="run folder of the dVAE (default: the one the prior was trained with)")
    parser.add_argument("--data", required=True, help="scenes with their truth; for stage dvae any captioned pictures")
    parser.add_argument(
        "--n",
        type=int,
        help=f"pictures, from the first on (default: {N_CAPTIONS}, for stage dvae {N_PICTURES}, where 0 is all)",
    )
    shown = f"{N_CAPTIONS_SHOWN}, for stage dvae {N_PICTURES_SHOWN} worst and {N_PICTURES_SHOWN} median ones"
    parser.add_argument("--n_shown", type=int, help=f"pictures kept for the report (default: {shown})")
    parser.add_argument(
        "--lpips", nargs="+", metavar="FILE", help="weights of AlexNet and of the LPIPS heads, .pth or .safetensors"
    )
    parser.add_argument("--last_weights", action="store_true", help="measure the last weights, not the averaged ones")
    add_flags(parser, SamplingConfig())


def run(args: argparse.Namespace) -> None:
    foreign = DVAE_FLAGS if args.stage == "prior" else PRIOR_FLAGS
    for flag in foreign:
        require(getattr(args, flag, None) is None, f"--{flag} says nothing with --stage {args.stage}: leave it out")
    (evaluate_prior if args.stage == "prior" else evaluate_dvae)(args)


def evaluate_prior(args: argparse.Namespace) -> None:
    """Caption accuracy of a prior, and of the true pictures through its dVAE."""
    import json
    from pathlib import Path

    from rich.progress import track

    from dalle_ds.data.images import picture_decode
    from dalle_ds.data.pipeline import Reader
    from dalle_ds.data.sources import open_source
    from dalle_ds.evaluation.caption_accuracy import list_figures, score, summarize
    from dalle_ds.evaluation.scene_reader import read_scene
    from dalle_ds.generation.pictures import Painter

    if args.prior is None:
        raise InputError("--prior is missing: give the run folder of a prior, or measure a dVAE with --stage dvae")
    n = N_CAPTIONS if args.n is None else args.n
    n_shown = N_CAPTIONS_SHOWN if args.n_shown is None else args.n_shown
    if n < 2:
        raise InputError(f"--n {n} must be at least 2: chance is measured against other captions")
    config = apply_flags(SamplingConfig(), args)
    painter = Painter.load(args.prior, args.dvae, averaged=not args.last_weights)
    decode = picture_decode(painter.dvae.config.image_size, augment=False)
    with Reader(open_source(args.data), decode, 1, epochs=1) as reader:
        samples = [sample for sample, _ in zip(reader, range(n), strict=False)]
    truths = [sample["truth"][0] for sample in samples]
    if any(truth is None or "objects" not in truth for truth in truths):
        raise InputError(f"{args.data} holds no scenes: caption accuracy needs the truth that make-scenes writes")
    captions = [truth["caption"] for truth in truths]
    pictures = painter.paint(captions, config)
    readings = [read_scene(picture) for picture in track(pictures, description="reading pictures")]
    scores = [score(reading, truth) for reading, truth in zip(readings, truths, strict=True)]
    figures = list_figures(summarize(scores, truths))
    # What the prior could reach at best: the true pictures, seen through the dVAE.
    rebuilt = painter.rebuild([sample["image"][0] for sample in samples])
    ceiling = [score(read_scene(picture), truth) for picture, truth in zip(rebuilt, truths, strict=True)]
    figures += [
        {**row, "name": row["name"].replace("caption accuracy", "dVAE reconstruction")}
        for row in list_figures(summarize(ceiling, truths))
        if row["name"] == "caption accuracy: all"
    ]
    run_folder = Path(args.prior)
    examples = _write_examples(run_folder, pictures[:n_shown], captions, readings, truths, scores)
    evaluation = {"data": args.data, "sampling": vars(config), "figures": figures, "examples": examples}
    (run_folder / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    _print_figures(figures, len(captions))


def _write_examples(
    run_folder: "Path",
    pictures: "Sequence[Any]",
    captions: "Sequence[str]",
    readings: "Sequence[Any]",
    truths: "Sequence[Any]",
    scores: "Sequence[Any]",
) -> list[dict[str, Any]]:
    """Saves the pictures and lists them with what was asked for and what was read."""
    from PIL import Image

    from dalle_ds.evaluation.caption_accuracy import describe

    folder = run_folder / "evaluation"
    folder.mkdir(exist_ok=True)
    examples = []
    for i, picture in enumerate(pictures):
        path = folder / f"{i:04d}.png"
        Image.fromarray(picture).save(path)
        examples.append(
            {
                "caption": captions[i],
                "file": str(path.relative_to(run_folder)),
                "right": bool(scores[i]["all"]),
                "read": describe(readings[i]),
                "truth": describe(truths[i]["objects"]),
            }
        )
    return examples


def _print_figures(figures: list[dict[str, Any]], n: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "95% interval", "chance", "cases", title=f"one picture for each of {n} captions")
    for row in figures:
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        table.add_row(row["name"], f"{row['value']:.1%}", interval, f"{row['chance']:.2%}", str(row["n"]))
    Console().print(table)


def evaluate_dvae(args: argparse.Namespace) -> None:
    """Reconstruction, bounds and codebook use of a dVAE over a validation set."""
    import json
    from pathlib import Path

    import torch

    from dalle_ds.data.skips import SkipLog
    from dalle_ds.evaluation.lpips import MIN_SIZE, load_lpips
    from dalle_ds.evaluation.reconstruction import Meter
    from dalle_ds.models.weights import load_dvae

    if args.dvae is None:
        raise InputError("--dvae is missing: give the run folder of `dalle-ds train-dvae`")
    n = N_PICTURES if args.n is None else args.n
    require(n >= 0, f"--n {n} must not be negative; 0 is all pictures")
    given = getattr(args, "temperature", None)
    require(given is None or given > 0, f"--temperature {given} must be positive with --stage dvae")
    config = apply_flags(SamplingConfig(batch_size=PICTURES_AT_ONCE), args)
    run_folder = Path(args.dvae)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dvae = load_dvae(run_folder, averaged=not args.last_weights).to(device)
    size = dvae.config.image_size
    require(not args.lpips or size >= MIN_SIZE, f"--lpips: pictures of {size} pixels are too small for AlexNet")
    distance = load_lpips(args.lpips).to(device) if args.lpips else None
    temperatures = [_end_temperature(run_folder), *([] if given is None else [given])]
    meter = Meter(dvae, temperatures, seed=config.seed, distance=distance)
    log = SkipLog()
    for images in _read_pictures(args.data, size, config.batch_size, n, log):
        meter.add(images.to(device))
    if log.n_skipped:
        print(f"warning: {log.summary()}", flush=True)
    evaluation = {
        "stage": "dvae",
        "data": args.data,
        "seed": config.seed,
        "figures": meter.figures(),
        "bounds": meter.bounds(),
        "grids": _write_grids(run_folder, args, meter),
    }
    (run_folder / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    _print_dvae_figures(meter)


def _end_temperature(run_folder: "Path") -> float:
    """The temperature that training reached; without metrics, the one that its schedule ends with."""
    from dalle_ds.config import DVAEScheduleConfig
    from dalle_ds.reporting.run_folder import read_run_folder
    from dalle_ds.storage.folders import run_of

    run = read_run_folder(run_of(run_folder))
    _, temperatures = run.curve("temperature")
    scheduled = run.config.get("schedule", {}).get("temperature_end", DVAEScheduleConfig().temperature_end)
    return float(temperatures[-1] if temperatures else scheduled)


def _read_pictures(data: str, size: int, batch_size: int, n: int, log: "SkipLog") -> "Iterator[Tensor]":
    """Yields the first n pictures (0: all) as uint8 [B, 3, size, size], the same ones in the same order each time."""
    import torch
    from rich.progress import Progress

    from dalle_ds.data.images import picture_decode
    from dalle_ds.data.pipeline import Reader
    from dalle_ds.data.sources import open_source

    decode = picture_decode(size, augment=False)
    reader = Reader(open_source(data), decode, batch_size, epochs=1, drop_last=False, log=log)
    n_read = 0
    with reader, Progress(transient=True) as progress:
        task = progress.add_task("measuring pictures", total=n or None)
        for batch in reader:
            images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)[: n - n_read if n else None]
            n_read += len(images)
            yield images
            progress.update(task, advance=len(images))
            if n_read == n:
                break


def _write_grids(run_folder: "Path", args: argparse.Namespace, meter: "Meter") -> list[dict[str, str]]:
    """Saves the worst and the median pictures by PSNR above their rebuildings, read a second time, and lists them."""
    from dalle_ds.data.skips import SkipLog
    from dalle_ds.reporting.grid import pairs_grid

    n_shown = min(N_PICTURES_SHOWN if args.n_shown is None else args.n_shown, meter.n)
    if n_shown < 1:
        return []
    order = sorted(range(meter.n), key=lambda i: meter.psnr[i])
    middle = (meter.n - n_shown) // 2
    chosen = {"worst": order[:n_shown], "median": order[middle : middle + n_shown]}
    wanted, pictures = {i for places in chosen.values() for i in places}, {}
    size, device = meter.dvae.config.image_size, next(meter.dvae.parameters()).device
    for i, image in enumerate(_read_pictures(args.data, size, 1, meter.n, SkipLog())):
        if i in wanted:
            rebuilt = meter.dvae.decode(meter.dvae.encode(image.to(device)))
            pictures[i] = [stack[0].permute(1, 2, 0).cpu().numpy() for stack in (image, rebuilt)]
    (run_folder / "evaluation").mkdir(exist_ok=True)
    grids = []
    for name, places in chosen.items():
        originals, rebuildings = zip(*(pictures[i] for i in places), strict=True)
        file = f"evaluation/{name}.png"
        pairs_grid(originals, rebuildings, columns=8, scale=max(1, 128 // size)).save(run_folder / file)
        low, high = meter.psnr[places[0]], meter.psnr[places[-1]]
        title = f"the {name} of {meter.n:,} pictures, {low:.1f} to {high:.1f} dB"
        grids.append({"file": file, "title": title})
    return grids


def _print_dvae_figures(meter: "Meter") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("figure", title=f"{meter.n:,} pictures, rebuilt from their likeliest tokens")
    table.add_column("value", justify="right")
    for row in meter.figures():
        if not row["name"].startswith("ELBO,"):
            table.add_row(row["name"], f"{row['value']:.4g}")
    console.print(table)
    columns = {"reconstruction": "reconstruction", "kl": "KL", "elbo": "ELBO", "bytes": "bytes"}
    for unit in ("nats", "bits"):
        terms = Table("decoder", title=f"{unit} a dimension; ELBO = -(reconstruction + KL), bytes: code length")
        for title in columns.values():
            terms.add_column(title, justify="right")
        for row in meter.bounds():
            name = row["decoder"] if row["is_bound"] else f"{row['decoder']} (no bound)"
            terms.add_row(name, *(f"{row[f'{column}_{unit}']:.4f}" for column in columns))
        console.print(terms)
    cells = [f"{row['decoder']} {row['kl_nats_per_cell']:.3f}" for row in meter.bounds() if row["is_bound"]]
    console.print(f"KL in nats a cell: {', '.join(cells)}; of ln {meter.dvae.config.vocab_size:,} at most")
