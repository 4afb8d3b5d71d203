"""Measure how often a picture shows what its caption says: shape, colour, place and relation, read back by a program.

    dalle-ds evaluate --prior runs/prior --data data/scenes/held_out

The data are scenes of `dalle-ds make-scenes`, whose truth is known; one picture is drawn for each caption and read by
the scene reader (no learning). Writes evaluation.json and the pictures into the run folder, chance level included.
"""

import argparse
from typing import TYPE_CHECKING, Any

from dalle_ds.config import InputError, SamplingConfig
from dalle_ds.flags import add_flags, apply_flags

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prior", required=True, help="run folder of `dalle-ds train-prior`")
    parser.add_argument("--dvae", help="run folder of the dVAE (default: the one the prior was trained with)")
    parser.add_argument("--data", required=True, help="scenes with their truth: a folder of shards, or a pattern")
    parser.add_argument("--n", type=int, default=500, help="captions, from the first on (default: 500)")
    parser.add_argument("--n_shown", type=int, default=48, help="pictures kept for the report (default: 48)")
    add_flags(parser, SamplingConfig())


def run(args: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    from rich.progress import track

    from dalle_ds.data.images import picture_decode
    from dalle_ds.data.pipeline import Reader
    from dalle_ds.data.sources import open_source
    from dalle_ds.evaluation.caption_accuracy import list_figures, score, summarize
    from dalle_ds.evaluation.scene_reader import read_scene
    from dalle_ds.generation.pictures import Painter

    if args.n < 2:
        raise InputError(f"--n {args.n} must be at least 2: chance is measured against other captions")
    config = apply_flags(SamplingConfig(), args)
    painter = Painter.load(args.prior, args.dvae)
    decode = picture_decode(painter.dvae.config.image_size, augment=False)
    with Reader(open_source(args.data), decode, 1, epochs=1) as reader:
        samples = [sample for sample, _ in zip(reader, range(args.n), strict=False)]
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
    examples = _write_examples(run_folder, pictures[: args.n_shown], captions, readings, truths, scores)
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
