"""Make a run folder of what `dalle-ds export` wrote.

    dalle-ds import-model exported/prior --out runs/prior

The run folder serves wherever that of a trained model does: encode-images, train-prior, sample, evaluate, --init_from.
It cannot be trained on with --resume, for it holds no optimizer.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from dalle_ds.config import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of `dalle-ds export`")
    parser.add_argument("--out", required=True, help="run folder to write")
    parser.add_argument(
        "--dvae", default="", help="run folder of the prior's dVAE (else sample and evaluate ask for it)"
    )


def run(args: argparse.Namespace) -> None:
    from safetensors import safe_open

    from dalle_ds import __version__
    from dalle_ds.commands.export import CONFIG, NAMES, TOKENIZER, WEIGHTS
    from dalle_ds.models.weights import write_weights
    from dalle_ds.storage.files import measure, new_folder, read_json

    folder = Path(args.folder)
    with new_folder(Path(args.out)) as out:
        settings = read_json(folder / CONFIG)
        if settings.get("kind") not in NAMES or "step" not in settings or "model" not in settings.get("config", {}):
            raise InputError(f"{folder} is not what `dalle-ds export` writes: {CONFIG} names no kind, step and model")
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise InputError(f"{weights}: no such file")
        if measure(weights)["sha256"] != settings["sha256"]:
            raise InputError(f"{weights} is not the file that was exported: its SHA-256 differs; copy it again")
        description = {name: value for name, value in settings.items() if name not in ("step", "averaged", "sha256")}
        description["imported"] = {"file": str(weights), "sha256": settings["sha256"], "version": __version__}
        if settings["kind"] == "prior":
            description["dvae"] = args.dvae
        with safe_open(weights, "pt") as file:
            check_fit(weights, file, description)
            tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (it is no dict)
            write_weights(out, description, settings["step"], tensors)
        if (folder / TOKENIZER).exists():
            shutil.copyfile(folder / TOKENIZER, out / TOKENIZER)
    print(f"{args.out}: {NAMES[settings['kind']].partition(':')[0]} of step {settings['step']}", flush=True)


def check_fit(weights: Path, file: Any, description: dict[str, Any]) -> None:
    """Raises InputError unless the open file holds just the parameters of the model that its config.json describes."""
    import torch

    from dalle_ds.models.weights import make_model

    with torch.device("meta"):
        model = make_model(description, str(weights.parent))
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name in [*wanted, *given]:
        if wanted.get(name) != given.get(name):
            raise InputError(f"{weights} is of another model: parameter {name!r} does not fit its config.json")
