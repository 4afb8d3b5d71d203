"""Make a run folder out of the released dVAE weights, or of what `dalle-ds export-dvae` wrote.

    dalle-ds import-dvae --encoder encoder.pkl --decoder decoder.pkl --out runs/released

Reads the pickles of the release without running anything in them and without its package, and state dicts (.pt, .pth,
.safetensors). The run folder serves wherever that of a trained dVAE does: encode-images, train-prior, sample, evaluate.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_ds.config import InputError

if TYPE_CHECKING:
    from dalle_ds.models.dvae import DVAE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", required=True, help="the encoder's file: .pkl, .pt, .pth or .safetensors")
    parser.add_argument("--decoder", required=True, help="the decoder's file, of the same dVAE")
    parser.add_argument("--out", required=True, help="run folder to write")
    parser.add_argument(
        "--image_size", type=int, help="side of the pictures it will encode (default: what an export noted, or 256)"
    )


def run(args: argparse.Namespace) -> None:
    from dalle_ds.models.release import PARTS, assemble, read_part

    out = Path(args.out)
    check_free(out)
    encoder, decoder = (read_part(Path(path)) for path in (args.encoder, args.decoder))
    model = assemble(encoder, decoder, args.image_size)
    files = zip(PARTS, (encoder, decoder), strict=True)
    imported = {part: {"file": str(file.path), "sha256": file.sha256} for part, file in files}
    write_imported(out, model, imported)
    config = model.config
    print(
        f"{out}: dVAE of {sum(p.numel() for p in model.parameters()):,} parameters, {config.vocab_size:,} tokens, "
        f"pictures of {config.image_size} x {config.image_size} into {config.grid_size} x {config.grid_size} of them",
        flush=True,
    )


def check_free(out: Path) -> None:
    """Raises InputError when `out` holds anything."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    if (out / "config.json").exists():
        raise InputError(f"{out} already holds a run: choose another --out, or remove it")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out} is not empty: name a new folder")


def write_imported(out: Path, model: "DVAE", imported: dict[str, Any]) -> None:
    """Writes the run folder beside `out` and moves it there when it is complete."""
    from dataclasses import asdict

    from dalle_ds import __version__
    from dalle_ds.training.portable import Entry, write_tensors

    staging = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.partial")
    description = {
        "kind": "dvae",
        "version": __version__,
        "config": {"model": asdict(model.config)},
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "imported": imported,
    }
    checkpoint = staging / "checkpoints" / "step-00000000"
    try:
        checkpoint.mkdir(parents=True)
        # As a checkpoint's file, so that the same weights have the same fingerprint.
        weights = model.state_dict()
        entries = [Entry(name, weight.dtype, tuple(weight.shape)) for name, weight in weights.items()]
        write_tensors(checkpoint / "model.safetensors", entries, weights.values())
        (checkpoint / "complete.json").write_text(json.dumps({"step": 0, "imported": True}) + "\n")
        (staging / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        staging.replace(out.absolute())
    finally:
        shutil.rmtree(staging, ignore_errors=True)
