"""Write a trained model as one safetensors file, a JSON of its settings and a model card.

    dalle-ds export runs/prior --out exported/prior

Takes a run folder of either stage, or one of its checkpoints: the averaged parameters where training has kept some.
Every file of the checkpoint is checked first. Weights are in float32, and their SHA-256 is what token shards remember
of a dVAE, so that tokens made with an exported one stay those of the run's. `dalle-ds import-model` makes a run folder
of it again. The card's licence line is for you to fill in.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG, CARD, TOKENIZER = "model.safetensors", "config.json", "README.md", "tokenizer.model"
# Entries of a run's config.json that say what the model is; the others say where and how it was trained.
KEPT = ("kind", "version", "n_parameters", "dvae_sha256", "tokenizer_sha256")
NAMES = {
    "dvae": "discrete VAE: the first stage, which turns pictures into a grid of tokens and back",
    "prior": "transformer over captions and image tokens: the second stage, which draws pictures for captions",
}
USES = {
    "dvae": "dalle-ds encode-images --dvae RUN ...\n    dalle-ds reconstruct --dvae RUN ...",
    "prior": 'dalle-ds sample --prior RUN --dvae ITS_DVAE --out pictures "a red circle"',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder of `dalle-ds train-dvae` or `train-prior`, or one of its checkpoints")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--last_weights", action="store_true", help="the last weights, not the averaged ones")


def run(args: argparse.Namespace) -> None:
    from dalle_ds.models.weights import open_weights
    from dalle_ds.storage.files import new_folder, read_json
    from dalle_ds.storage.folders import read_marker, run_of
    from dalle_ds.storage.pieces import AVERAGE, write_tensors

    kind = read_json(Path(args.run) / CONFIG).get("kind")
    kind = kind if kind in NAMES else "prior"  # opening it says what is wrong
    averaged = not args.last_weights
    with new_folder(Path(args.out)) as out, open_weights(args.run, kind, averaged=averaged, read_through=True) as found:
        tensors = (tensor for _, tensor in found.tensors())
        record = write_tensors(out / WEIGHTS, found.entries(), tensors)
        facts = {
            "step": read_marker(found.checkpoint)["step"],
            "averaged": found.is_average,
            "sha256": record["sha256"],
        }
        settings = {name: found.description[name] for name in KEPT if name in found.description} | facts
        settings["config"] = {"model": found.description["config"]["model"]}
        folder = run_of(found.checkpoint)
        ds_config = read_json(found.checkpoint / "ds_config.json")
        (out / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        has_other = found.pieces.has(AVERAGE) and not found.is_average
        figures = {} if has_other else validation_of(folder, facts["step"])
        (out / CARD).write_text(make_card(found.description, settings, ds_config, figures))
        if (folder / TOKENIZER).exists():
            shutil.copyfile(folder / TOKENIZER, out / TOKENIZER)
    print(f"{args.out}: {NAMES[kind].partition(':')[0]} of step {facts['step']}, with its card", flush=True)


def validation_of(run: Path, step: int) -> dict[str, float]:
    """The figures on validation data that training measured after that step, of the averaged weights where it has some.

    Empty where it measured none.
    """
    from dalle_ds.training.metrics import read_metrics

    for line in reversed(read_metrics(run / "metrics.jsonl")):
        if (line.get("kind"), line.get("step")) == ("validation", step):
            return {name: value for name, value in line.items() if name not in ("kind", "step", "time")}
    return {}


def make_card(
    description: dict[str, Any], settings: dict[str, Any], ds_config: dict[str, Any], validation: dict[str, float]
) -> str:
    """The model card, in Markdown."""
    kind: str = settings["kind"]
    config = description["config"]
    enabled = [name for name in ("fp16", "bf16") if ds_config.get(name, {}).get("enabled")]
    optimizer = ds_config.get("optimizer", {})
    data = config.get("data", {})
    made: dict[str, Any] = {
        "steps": settings["step"],
        "weights": "averaged over training" if settings["averaged"] else "of the last step",
        "optimizer": f"{optimizer.get('type', '?')}, peak learning rate {optimizer.get('params', {}).get('lr', '?')}",
        "precision": enabled[0] if enabled else "fp32",
        "ZeRO stage": ds_config.get("zero_optimization", {}).get("stage", 0),
        "processes": description.get("world_size", "?"),
        "seed": config.get("loop", {}).get("seed", "?"),
        "versions": ", ".join(f"{name} {version}" for name, version in description.get("versions", {}).items()),
    }
    if "imported" in description:
        made = {"imported from": json.dumps(description["imported"])}
    identities: dict[str, Any] = {
        name: settings[name] for name in ("sha256", "dvae_sha256", "tokenizer_sha256") if name in settings
    }
    files = {WEIGHTS: "weights, float32", CONFIG: "settings"}
    parts: dict[str, str] = {
        "What it is": f"A {NAMES[kind]} ([Zero-Shot Text-to-Image Generation](https://arxiv.org/abs/2102.12092)).\n\n"
        + table({"parameters": f"{settings.get('n_parameters', 0):,}", **settings["config"]["model"]}),
        "How it was made": f"By dalle-ds {description.get('version', '?')}.\n\n" + table(made),
        "Data": table({"training": data.get("train", "?"), "validation": data.get("validation") or "none"}),
        "Figures on validation data": table(validation) if validation else "None were recorded.",
        "Files": table(files | identities),
        "How to use it": f"    dalle-ds import-model THIS_FOLDER --out RUN\n    {USES[kind]}",
        "Licence": "<!-- Say under which terms others may use the model; the data may set some. -->\nNot stated yet.",
    }
    return "# " + kind + "\n\n" + "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items()) + "\n"


def table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
