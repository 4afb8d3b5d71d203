"""The weights of a trained model, whole, out of the pieces of a run's checkpoint: safetensors and JSON, never a pickle.

Files are mapped into memory and put together a parameter at a time, so that reading takes no more than the model does.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.config import DVAEConfig, InputError, PriorConfig
from dalle_ds.flags import from_dict
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.prior import Prior
from dalle_ds.storage import folders
from dalle_ds.storage.files import replace_file, write_json
from dalle_ds.storage.folders import SHARDS, check_format, complete_checkpoints, find_faults, is_checkpoint, read_marker
from dalle_ds.storage.pieces import AVERAGE, WEIGHT, Entry, Piece, PieceReader, digest_tensors, write_pieces

CONFIG = "config.json"
# Kind of run -> its model, and the model's settings.
MODELS: dict[str, tuple[Any, type[Any]]] = {
    "dvae": (DVAE, DVAEConfig),
    "dvae-warm-start": (DVAE, DVAEConfig),
    "prior": (Prior, PriorConfig),
}
# A checkpoint of no more bytes than this is read through before it is used; of larger ones only sizes are looked at.
READ_THROUGH = 2**30


def load_dvae(path: str | Path, kind: str = "dvae", *, averaged: bool = True) -> DVAE:
    """The dVAE of a run folder, of its newest complete checkpoint; in evaluation mode, float32, on the CPU.

    Its averaged parameters, where training has kept some; the last ones when not `averaged`.
    """
    return _load(path, kind, averaged)  # type: ignore[return-value]


def load_prior(path: str | Path, *, averaged: bool = True) -> Prior:
    """The prior of a run folder, as `load_dvae` loads a dVAE."""
    return _load(path, "prior", averaged)  # type: ignore[return-value]


def _load(path: str | Path, kind: str, averaged: bool) -> nn.Module:
    with open_weights(path, kind, averaged=averaged) as weights, torch.no_grad():
        model = make_model(weights.description, str(path))
        given = model.state_dict()
        for name, tensor in weights.tensors():
            given[name].copy_(tensor)
    return model.eval()


def make_model(description: dict[str, Any], where: str) -> nn.Module:
    """A model of the kind and the settings that a config.json has; `where` is what errors speak of."""
    model, config = MODELS[description["kind"]]
    return model(from_dict(config, description["config"]["model"], where))  # type: ignore[no-any-return]


def find_weights(path: str | Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """(newest complete checkpoint, content of config.json) of the run folder `path`, which may be a checkpoint itself.

    Raises InputError when there is no run, no complete checkpoint, or a model of another kind.
    """
    folder = Path(path)
    if not (folder / CONFIG).exists():
        raise InputError(f"{path} is no run folder: it has no {CONFIG}; give the --out of `dalle-ds train-{kind}`")
    description = read_description(folder)
    if description["kind"] != kind:
        raise InputError(f"{path} holds a {description['kind']}, and a {kind} is wanted here; give a {kind} run")
    checkpoints = [folder] if is_checkpoint(folder) else complete_checkpoints(folder)
    if not checkpoints:
        raise InputError(f"{path} has no complete checkpoint yet; let `dalle-ds train-{kind}` reach its first save")
    return checkpoints[-1], description


def read_description(folder: Path) -> dict[str, Any]:
    """The config.json of a run folder or a checkpoint. Raises InputError when it is not one that training wrote."""
    try:
        description = json.loads((folder / CONFIG).read_text())
    except ValueError:
        description = None
    if not isinstance(description, dict) or not {"kind", "config"} <= set(description):
        raise InputError(f"{folder / CONFIG} is not one that training wrote: it names no kind and config")
    return description


@dataclass(frozen=True)
class Weights:
    """Whole weights that are still on the disk."""

    checkpoint: Path
    description: dict[str, Any]
    is_average: bool
    shapes: dict[str, tuple[int, ...]]
    pieces: PieceReader

    def entries(self) -> list[Entry]:
        """What they are in a file of their own."""
        return [Entry(name, torch.float32, shape) for name, shape in self.shapes.items()]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight in float32), one after the other."""
        kind = AVERAGE if self.is_average else WEIGHT
        for name, shape in self.shapes.items():
            yield name, self.pieces.read(name, kind, 0, torch.Size(shape).numel()).view(shape).float()


@contextlib.contextmanager
def open_weights(
    path: str | Path, kind: str, *, averaged: bool = True, read_through: bool | None = None
) -> Iterator[Weights]:
    """The weights of a run folder or checkpoint, while the context is open: their average, unless not `averaged`.

    Files are checked before: their sizes, and where they are small, or `read_through` says so, every byte. Raises
    InputError, naming the file, for one that is damaged; and what `find_weights` raises.
    """
    checkpoint, description = find_weights(path, kind)
    check_whole(checkpoint, read_through)
    with torch.device("meta"):
        model = make_model(description, str(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with folders.open_pieces(checkpoint) as pieces:
        pieces.check_fit({name: torch.Size(shape).numel() for name, shape in shapes.items()})
        yield Weights(checkpoint, description, averaged and pieces.has(AVERAGE), shapes, pieces)


def check_whole(checkpoint: Path, read_through: bool | None = None) -> None:
    """Raises InputError, naming the file, for a checkpoint of another version or with a damaged file."""
    check_format(checkpoint)
    if read_through is None:
        read_through = sum(record["size"] for record in read_marker(checkpoint)["files"].values()) <= READ_THROUGH
    faults = find_faults(checkpoint, contents=read_through)
    if faults:
        raise InputError(f"{faults[0]}: it is damaged; bring back a copy, or give an older checkpoint")


def fingerprint(path: str | Path, kind: str, *, averaged: bool = True) -> str:
    """SHA-256 of the file that `dalle-ds export` would write: what token shards remember of the dVAE that made them.

    The same for the same weights, however many processes have saved them.
    """
    with open_weights(path, kind, averaged=averaged) as weights:
        return digest_tensors(weights.entries(), (tensor for _, tensor in weights.tensors()))


def check_settings(path: str | Path, kind: str, config: Any) -> Path:
    """The checkpoint of `path` whose weights a model of `config` can begin with.

    Raises InputError, with the flags that would do, when the weights are of another model; dropout may differ.
    """
    checkpoint, description = find_weights(path, kind)
    check_whole(checkpoint)
    given, wanted = asdict(from_dict(type(config), description["config"]["model"], str(path))), asdict(config)
    differing = [f"--model.{key} {value}" for key, value in given.items() if key != "dropout" and wanted[key] != value]
    if differing:
        raise InputError(f"--init_from {path} is another model: pass {' '.join(differing)}")
    return checkpoint


def write_weights(run: Path, description: dict[str, Any], step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Makes a run folder that holds whole weights and nothing to go on training with: what imports leave."""
    folder = folders.begin(run, step)
    (folder / SHARDS).mkdir()
    shard = f"{SHARDS}/shard-00000.safetensors"
    pieces = [Piece(name, WEIGHT, 0, tensor.flatten()) for name, tensor in weights]
    files = {shard: write_pieces(folder / shard, pieces, {}), CONFIG: write_json(folder / CONFIG, description)}
    folders.publish(folder, {"step": step, "world_size": 1, "files": files})
    replace_file(run / CONFIG, (json.dumps(description, indent=2) + "\n").encode())
