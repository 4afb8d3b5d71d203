"""Write a dVAE as state dicts that the classes of the authors' release load, encoder and decoder apart.

    dalle-ds export-dvae --dvae runs/dvae --encoder encoder.pt --decoder decoder.pt

The suffix chooses: .pt or .pth for torch.save, .safetensors. Sizes are noted in a JSON beside each. Settings that the
released classes do not have are refused, as these would compute something else; --force writes all the same.
"""

import argparse
from pathlib import Path

from dalle_ds.config import InputError

SUFFIXES = (".pt", ".pth", ".safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dvae", required=True, help="run folder of `dalle-ds train-dvae`, or one of its checkpoints")
    parser.add_argument("--encoder", required=True, help="file to write: .pt, .pth or .safetensors")
    parser.add_argument("--decoder", required=True, help="file to write: .pt, .pth or .safetensors")
    parser.add_argument("--force", action="store_true", help="write even what the released classes cannot compute")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def run(args: argparse.Namespace) -> None:
    from dalle_ds.models.release import PARTS, export_part, find_differences, note_path
    from dalle_ds.models.weights import load_dvae

    paths = [Path(args.encoder), Path(args.decoder)]
    check_targets([*paths, *map(note_path, paths)], args.overwrite)
    model = load_dvae(args.dvae)
    differences = find_differences(model.config)
    if differences and not args.force:
        raise InputError(
            f"{args.dvae} cannot be built from the released classes: {'; '.join(differences)}; "
            "give --force to write it for import-dvae alone"
        )
    files: dict[Path, bytes] = {}
    for part, path in zip(PARTS, paths, strict=True):
        files |= export_part(model, part, path, str(args.dvae))
    write_all(files)
    if differences:
        print(f"warning: the released classes cannot compute this dVAE: {'; '.join(differences)}", flush=True)
    print(f"{paths[0]}, {paths[1]}: encoder and decoder, with their sizes in a .json beside each", flush=True)


def check_targets(paths: list[Path], overwrite: bool) -> None:
    """Raises InputError for a suffix that says nothing, one path for two files, and a file that exists."""
    for path in paths[:2]:
        if path.suffix not in SUFFIXES:
            raise InputError(f"{path}: the suffix chooses the format; use {', '.join(SUFFIXES)}")
    if paths[0].absolute() == paths[1].absolute():
        raise InputError(f"--encoder and --decoder are both {paths[0]}: name two files")
    for path in paths:
        if path.is_dir() or (path.exists() and not overwrite):
            raise InputError(f"{path} exists: choose another name, or give --overwrite")


def write_all(files: dict[Path, bytes]) -> None:
    """Writes all files aside and then moves them into place, so that none is half-written."""
    partial = {path: path.with_name(f".{path.name}.partial") for path in files}
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial[path].write_bytes(data)
        for path in files:
            partial[path].replace(path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
