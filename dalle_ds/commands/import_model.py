"""Make a run folder of what `dalle-ds export` wrote.

    dalle-ds import-model exported/prior --out runs/prior

The run folder serves wherever that of a trained model does: encode-images, train-prior, sample, evaluate, --init_from.
It cannot be trained on with --resume, for it holds no optimizer.
"""

import argparse
import json
import os
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
    from dalle_ds import __version__
    from dalle_ds.commands.export import CONFIG, NAMES, TOKENIZER, WEIGHTS, read_json, sha256
    from dalle_ds.commands.import_dvae import check_free

    folder, out = Path(args.folder), Path(args.out)
    check_free(out)
    settings = read_json(folder / CONFIG)
    if settings.get("kind") not in NAMES or "step" not in settings or "model" not in settings.get("config", {}):
        raise InputError(f"{folder} is not what `dalle-ds export` writes: its {CONFIG} names no kind, step and model")
    if sha256(folder / WEIGHTS) != settings["sha256"]:
        raise InputError(f"{folder / WEIGHTS} is not the file that was exported: its SHA-256 differs; copy it again")
    check_fit(folder / WEIGHTS, settings)
    step = settings["step"]
    staging = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.partial")
    checkpoint = staging / "checkpoints" / f"step-{step:08d}"
    description = {name: value for name, value in settings.items() if name not in ("step", "averaged", "sha256")}
    description["imported"] = {"file": str(folder / WEIGHTS), "sha256": settings["sha256"], "version": __version__}
    if settings["kind"] == "prior":
        description["dvae"] = args.dvae
    try:
        checkpoint.mkdir(parents=True)
        shutil.copyfile(folder / WEIGHTS, checkpoint / WEIGHTS)
        if (folder / TOKENIZER).exists():
            shutil.copyfile(folder / TOKENIZER, staging / TOKENIZER)
        (checkpoint / "complete.json").write_text(json.dumps({"step": step, "imported": True}) + "\n")
        (staging / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
        if out.exists():
            out.rmdir()
        staging.rename(out.absolute())
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{out}: {NAMES[settings['kind']].partition(':')[0]} of step {step}", flush=True)


def check_fit(weights: Path, settings: dict[str, Any]) -> None:
    """Raises InputError unless the file holds just the parameters of the model that the settings describe."""
    import torch
    from safetensors import safe_open

    from dalle_ds.config import DVAEConfig, PriorConfig
    from dalle_ds.flags import from_dict
    from dalle_ds.models.dvae import DVAE
    from dalle_ds.models.prior import Prior

    model, where = settings["config"]["model"], str(weights.parent)
    with torch.device("meta"):
        built = DVAE(from_dict(DVAEConfig, model, where)) if settings["kind"] == "dvae" else None
        built_model = Prior(from_dict(PriorConfig, model, where)) if built is None else built
    wanted = {name: list(tensor.shape) for name, tensor in built_model.state_dict().items()}
    with safe_open(weights, "pt") as file:
        given = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name in [*wanted, *given]:
        if wanted.get(name) != given.get(name):
            raise InputError(f"{weights} is of another model: parameter {name!r} does not fit its config.json")
