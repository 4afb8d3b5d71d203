"""The dVAE of the authors' release (2021, package `dall_e`) and ours: one is read from, and written as, the other.

The structure is the same (Appendix A.1), and so are the names of the parameters, but for a leading `encoder.` or
`decoder.`: the release keeps the two in files of their own. Sizes are worked out from the shapes.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_ds import __version__
from dalle_ds.config import DVAEConfig, InputError
from dalle_ds.flags import from_dict
from dalle_ds.models.dvae import CHANNELS, DVAE, N_GROUP
from dalle_ds.models.saved_tensors import read_saved_tensors

PARTS = ("encoder", "decoder")
INPUT, OUTPUT = "blocks.input.w", "blocks.output.conv.w"
FIRST_CONV = re.compile(r"blocks\.group_1\.block_\d+\.res_path\.conv_1\.w")
INPUT_KERNEL = 7
IMAGE_SIZE = 256
# What the constructors of the release accept.
RELEASE_MINIMA = {"n_hid": 64, "vocab_size": 512, "n_init": 8}


@dataclass(frozen=True)
class PartFile:
    """An encoder or a decoder as it lies in a file.

    settings: the DVAEConfig that our export noted beside it, or none. post_gains: as the modules of a pickle say.
    """

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    post_gains: set[float]
    settings: dict[str, Any] | None

    @property
    def n_blk_per_group(self) -> int:
        return sum(FIRST_CONV.fullmatch(name) is not None for name in self.tensors)

    @property
    def part(self) -> str | None:
        """encoder, decoder, or None for neither."""
        entrance, exit_ = (self.tensors.get(name, torch.empty(0)).shape for name in (INPUT, OUTPUT))
        if len(entrance) != 4 or len(exit_) != 4 or not self.n_blk_per_group:
            return None
        if entrance[1:] == (CHANNELS, INPUT_KERNEL, INPUT_KERNEL):
            return "encoder"
        return "decoder" if exit_[0] == 2 * CHANNELS and entrance[2:] == (1, 1) else None


def read_part(path: Path) -> PartFile:
    """Reads a released pickle, or a state dict (.pt, .pth, .safetensors), without running anything in it.

    Raises InputError for a file that holds anything else, a number that is not finite, or a note of another file.
    """
    if not path.is_file():
        raise InputError(f"{path} is no file; give the encoder's or the decoder's weights")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".safetensors":
        tensors, post_gains = _read_safetensors(path), set[float]()
    else:
        tensors, post_gains = read_saved_tensors(path)
    for name, tensor in tensors.items():
        n_bad = int((~tensor.isfinite()).sum())
        if n_bad:
            raise InputError(f"{path}: parameter {name!r} holds {n_bad} numbers that are not finite; get another file")
    return PartFile(path, sha256, tensors, post_gains, _read_note(path, sha256))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is no whole safetensors file ({error}); get it again") from error
    return {name: tensor.float() for name, tensor in tensors.items()}


def assemble(encoder: PartFile, decoder: PartFile, image_size: int | None = None) -> DVAE:
    """The dVAE of two files, in evaluation mode.

    image_size: of the pictures it will see, which no weight knows; None for what an export noted, or 256.
    Raises InputError, in one line that names the file, when they are not an encoder and a decoder of one dVAE.
    """
    if (encoder.part, decoder.part) == ("decoder", "encoder"):
        raise InputError(f"{encoder.path} holds a decoder and {decoder.path} an encoder: exchange the two")
    for file, part in zip((encoder, decoder), PARTS, strict=True):
        if file.part != part:
            what = f"{'an' if file.part == 'encoder' else 'a'} {file.part}" if file.part else f"no {part}"
            raise InputError(f"{file.path} holds {what} of the release; give the {part}'s weights here")
    config = _join_settings(encoder, decoder, image_size)
    with torch.device("meta"):  # shapes, not the seconds that drawing 97 million random numbers takes
        model = DVAE(config)
    for part, file in zip(PARTS, (encoder, decoder), strict=True):
        module = model.get_submodule(part)
        _check_shapes(file, {name: list(tensor.shape) for name, tensor in module.state_dict().items()})
        module.load_state_dict(file.tensors, assign=True)
    return model.eval()


def _join_settings(encoder: PartFile, decoder: PartFile, image_size: int | None) -> DVAEConfig:
    """The config that both files agree on: sizes by their shapes, the rest as noted by an export."""
    both = [_find_sizes(encoder), _find_sizes(decoder)]
    for name, value in both[0].items():
        other = both[1].get(name, value)
        if value != other:
            raise InputError(
                f"{encoder.path} has {name} {value} and {decoder.path} has {other}: they are not of one dVAE; "
                "give two files that belong together"
            )
    notes = [file.settings for file in (encoder, decoder) if file.settings is not None]
    if len(notes) == 2 and notes[0] != notes[1]:
        raise InputError(f"{encoder.path} and {decoder.path} were exported from two dVAEs; give two of one export")
    settings: dict[str, Any] = {"image_size": IMAGE_SIZE, **_find_post_gain(encoder, decoder, both[0])}
    settings |= {**(notes[0] if notes else {}), **both[0], **both[1]}
    if image_size is not None:
        settings["image_size"] = image_size
    return from_dict(DVAEConfig, settings, str(encoder.path))


def _find_sizes(file: PartFile) -> dict[str, int]:
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    sizes = {"n_blk_per_group": file.n_blk_per_group}
    if file.part == "encoder":
        return {**sizes, "n_hid": shapes[INPUT][0], "vocab_size": shapes[OUTPUT][0]}
    n_init, vocab_size = shapes[INPUT][:2]
    return {**sizes, "n_hid": shapes[OUTPUT][1], "vocab_size": vocab_size, "n_init": n_init}


def _find_post_gain(encoder: PartFile, decoder: PartFile, sizes: dict[str, int]) -> dict[str, float]:
    """The constant on the resblocks when a whole module was saved with another one than the release computes."""
    gains = encoder.post_gains | decoder.post_gains
    if len(gains) > 1:
        raise InputError(f"{encoder.path} and {decoder.path}: resblocks with different post_gain {sorted(gains)}")
    usual = 1 / (N_GROUP * sizes["n_blk_per_group"]) ** 2
    return {"post_gain": gains.pop()} if gains - {usual} else {}


def _check_shapes(file: PartFile, expected: dict[str, list[int]]) -> None:
    given = {name: list(tensor.shape) for name, tensor in file.tensors.items()}
    for name in [*expected, *given]:
        if given.get(name) == expected.get(name):
            continue
        if name not in given:
            problem = "is missing"
        elif name not in expected:
            problem = "is not of this model"
        else:
            problem = f"has shape {given[name]}, and {expected[name]} goes with the others"
        raise InputError(f"{file.path}: parameter {name!r} {problem}; give the {file.part} as it was released")


def find_differences(config: DVAEConfig) -> list[str]:
    """What keeps the released classes from computing this dVAE: one phrase a field, with what they do instead."""
    usual = 1 / (N_GROUP * config.n_blk_per_group) ** 2
    differences = [
        f"{name} {getattr(config, name)} (the release builds none below {least})"
        for name, least in RELEASE_MINIMA.items()
        if getattr(config, name) < least
    ]
    if config.post_gain not in (0, usual):
        differences.append(f"post_gain {config.post_gain} (the release computes with {usual:g})")
    if config.pool != "max":
        differences.append(f"pool {config.pool} (the release pools by the maximum)")
    if config.min_scale:
        differences.append(f"min_scale {config.min_scale} (the release has no floor under b)")
    return differences


def export_part(model: DVAE, part: str, path: Path, source: str) -> dict[Path, bytes]:
    """The files of one part, not yet written: its state dict, .safetensors or torch.save by `path`, and a JSON note."""
    import io

    from safetensors.torch import save

    module = model.get_submodule(part)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in module.state_dict().items()}
    if path.suffix == ".safetensors":
        data = save(tensors)
    else:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        data = buffer.getvalue()
    note = {
        "part": part,
        "model": asdict(model.config),
        "n_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "sha256": hashlib.sha256(data).hexdigest(),
        "from": source,
        "version": __version__,
    }
    return {path: data, note_path(path): (json.dumps(note, indent=2) + "\n").encode()}


def note_path(path: Path) -> Path:
    """The JSON beside an exported file."""
    return path.with_name(f"{path.name}.json")


def _read_note(path: Path, sha256: str) -> dict[str, Any] | None:
    """The model settings that `export_part` noted beside the file, or None where there is no note."""
    note_file = note_path(path)
    if not note_file.exists():
        return None
    try:
        note = json.loads(note_file.read_text())
    except ValueError:
        note = None
    if not isinstance(note, dict) or not isinstance(note.get("model"), dict):
        raise InputError(f"{note_file} is no note of `dalle-ds export-dvae`; move it away from {path.name}")
    if note.get("sha256") != sha256:
        raise InputError(f"{note_file} is the note of another file than {path.name}: its sha256 differs; remove one")
    settings: dict[str, Any] = note["model"]
    return settings
