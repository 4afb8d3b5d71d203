"""Make a run folder out of the released dVAE weights, or of what `dalle-ds export-dvae` wrote.

    dalle-ds import-dvae --encoder encoder.pkl --decoder decoder.pkl --out runs/released

Reads the pickles of the release without running anything in them and without its package, and state dicts (.pt, .pth,
.safetensors). The run folder serves wherever that of a trained dVAE does: encode-images, train-prior, sample, evaluate.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    encoder, decoder = (read_part(Path(path)) for path in (args.encoder, args.decoder))
    model = assemble(encoder, decoder, args.image_size)
    files = zip(PARTS, (encoder, decoder), strict=True)
    write_imported(
        Path(args.out), model, {part: {"file": str(file.path), "sha256": file.sha256} for part, file in files}
    )
    config = model.config
    print(
        f"{args.out}: dVAE of {count(model):,} parameters, {config.vocab_size:,} tokens, "
        f"pictures of {config.image_size} x {config.image_size} into {config.grid_size} x {config.grid_size} of them",
        flush=True,
    )


def write_imported(out: Path, model: "DVAE", imported: dict[str, Any]) -> None:
    """Makes the run folder of a dVAE that comes from elsewhere: `imported` says from where."""
    from dataclasses import asdict

    from dalle_ds import __version__
    from dalle_ds.models.weights import write_weights
    from dalle_ds.storage.files import new_folder

    description = {
        "kind": "dvae",
        "version": __version__,
        "config": {"model": asdict(model.config)},
        "n_parameters": count(model),
        "imported": imported,
    }
    with new_folder(out) as folder:
        write_weights(folder, description, 0, model.state_dict().items())


def count(model: "DVAE") -> int:
    return sum(parameter.numel() for parameter in model.parameters())
