"""Loads a trained model from a run folder or one of its checkpoints: safetensors and JSON, never a pickle."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from dalle_ds.config import DVAEConfig, InputError, PriorConfig
from dalle_ds.flags import from_dict
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.prior import Prior

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS, AVERAGED = "model.safetensors", "averaged.safetensors"


def load_dvae(path: str | Path, kind: str = "dvae", *, averaged: bool = True) -> DVAE:
    """The dVAE of a run folder, of its newest complete checkpoint; in evaluation mode, float32, on the CPU.

    Its averaged parameters, where training has kept some; the last ones when not `averaged`.
    """
    weights, description = find_weights(path, kind, averaged=averaged)
    return _fill(DVAE(from_dict(DVAEConfig, description["config"]["model"], str(path))), weights)


def load_prior(path: str | Path, *, averaged: bool = True) -> Prior:
    """The prior of a run folder, as `load_dvae` loads a dVAE."""
    weights, description = find_weights(path, "prior", averaged=averaged)
    return _fill(Prior(from_dict(PriorConfig, description["config"]["model"], str(path))), weights)


def find_weights(path: str | Path, kind: str, *, averaged: bool = True) -> tuple[Path, dict[str, Any]]:
    """(safetensors file, content of config.json) of the run folder or checkpoint folder `path`.

    The file is that of the averaged parameters where there are some and `averaged` asks for them. Raises InputError
    when there is no run, no complete checkpoint, or a model of another kind.
    """
    folder = Path(path)
    run = folder.parent.parent if (folder / "complete.json").exists() else folder
    if not (run / "config.json").exists():
        raise InputError(f"{path} is no run folder: it has no config.json; give the --out of `dalle-ds train-{kind}`")
    description = _read_description(run / "config.json")
    if description["kind"] != kind:
        raise InputError(f"{path} holds a {description['kind']}, and a {kind} is wanted here; give a {kind} run")
    checkpoints = sorted(run.glob("checkpoints/step-*/complete.json"))
    if not checkpoints:
        raise InputError(f"{path} has no complete checkpoint yet; let `dalle-ds train-{kind}` reach its first save")
    chosen = folder if run is not folder else checkpoints[-1].parent
    has_average = averaged and (chosen / AVERAGED).exists()
    return chosen / (AVERAGED if has_average else WEIGHTS), description


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text())
    except ValueError:
        description = None
    if not isinstance(description, dict) or not {"kind", "config"} <= set(description):
        raise InputError(f"{path} is not one that training wrote: it names no kind and config; give a run folder")
    return description


def fingerprint(path: str | Path, kind: str, *, averaged: bool = True) -> str:
    """SHA-256 of the file that is loaded: what token shards remember of the dVAE that made them."""
    weights, _ = find_weights(path, kind, averaged=averaged)
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def _fill(model: Model, weights: Path) -> Model:
    from safetensors.torch import load_file

    given = load_file(weights)
    given_shapes, shapes = ({name: t.shape for name, t in tensors.items()} for tensors in (given, model.state_dict()))
    for name in [*shapes, *given_shapes]:
        if shapes.get(name) != given_shapes.get(name):
            raise InputError(f"{weights} is of another model: parameter {name!r} does not fit its config.json")
    model.load_state_dict(given)
    return model.eval()
