"""LPIPS 0.1: how far apart two pictures are as AlexNet sees them (Zhang et al. 2018), with weights from local files.

The five convolution stages are named as torchvision publishes AlexNet (`features.0.weight`, ...), the linear heads as
the authors of LPIPS publish them (`lin0.model.1.weight`, ...; torchmetrics installs a copy of these, as
functional/image/lpips_models/alex.pth). Both may lie in one file. Nothing is downloaded.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle_ds.config import InputError

WIDTHS = (64, 192, 384, 256, 256)
# Layers of `features` after which a stage ends: its ReLU.
STAGE_ENDS = (1, 4, 7, 9, 11)
# ImageNet's mean and deviation by colour, for values in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
NORM_EPS = 1e-10
# The stride of the first convolution and two poolings leave nothing of a smaller picture.
MIN_SIZE = 31
# What torch.load raises on bytes that are no file of tensors.
PTH_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError)


class Lpips(nn.Module):
    """The distance of uint8 pictures [B, 3, S, S], S at least 31: [B], 0 for equal ones."""

    def __init__(self) -> None:
        super().__init__()
        w = WIDTHS
        self.features = nn.Sequential(
            nn.Conv2d(3, w[0], 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(w[0], w[1], 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(w[1], w[2], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(w[2], w[3], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(w[3], w[4], 3, padding=1),
            nn.ReLU(),
        )
        for i, width in enumerate(WIDTHS):
            self.add_module(f"lin{i}", _Head(width))

    @torch.no_grad()
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        total = torch.zeros(len(first), device=first.device)
        for i, (a, b) in enumerate(zip(self._stages(first), self._stages(second), strict=True)):
            difference = (_normalize(a) - _normalize(b)).square()
            total += self.get_submodule(f"lin{i}")(difference).flatten(1).mean(1)
        return total

    def _stages(self, images: Tensor) -> list[Tensor]:
        """The activations [B, C, H, W] at the end of each stage."""
        shift, scale = (torch.tensor(values, device=images.device)[:, None, None] for values in (SHIFT, SCALE))
        x = (images.float() / 127.5 - 1 - shift) / scale
        stages = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in STAGE_ENDS:
                stages.append(x)
        return stages


class _Head(nn.Module):
    """A weight for each channel; index 1 of `model`, as published, where 0 is the dropout of training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


def _normalize(x: Tensor) -> Tensor:
    """Unit length over the channels."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + NORM_EPS)


def load_lpips(paths: Sequence[str | Path]) -> Lpips:
    """The distance with the tensors of one or more .pth or .safetensors files, which may hold others as well.

    Raises InputError that names every tensor that is missing, or the one of another shape.
    """
    model = Lpips()
    wanted = model.state_dict()
    given: dict[str, Tensor] = {}
    for path in paths:
        given.update(_read_tensors(Path(path)))
    files = " and ".join(map(str, paths))
    missing = [name for name in wanted if name not in given]
    if missing:
        raise InputError(
            f"--lpips {files}: no tensor {', '.join(missing)}; give torchvision's AlexNet (features.*) "
            "and the LPIPS heads for it (lin*.model.1.weight), in one file or two"
        )
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            shapes = f"{list(given[name].shape)} and not {list(tensor.shape)}"
            raise InputError(f"--lpips {files}: {name} has the shape {shapes}; give the files of AlexNet")
    model.load_state_dict({name: given[name] for name in wanted})
    return model.eval().requires_grad_(False)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"--lpips {path}: no such file; give local .pth or .safetensors files")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, *PTH_ERRORS):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"--lpips {path}: holds no tensors by name; give a .pth state dict or a .safetensors file")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
