"""The pictures of dvae_peers.py: made scenes, real handwriting and real photographs, all 64 x 64, as .npz files.

Handwriting: the 1,797 digits of scikit-learn (8 x 8 pixels), sixteen to a page. Photographs: those that ship inside the
wheels of scikit-image, scikit-learn and matplotlib, as crops at random places and scales. No digit and no photograph is
in both the training and the validation set, and nothing is downloaded but the wheels.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dalle_ds.data.scenes import draw_scene, held_out_combinations, render

Pixels = npt.NDArray[np.uint8]  # [N, SIZE, SIZE, 3]
SPLITS = ("train", "validation")
SIZE = 64

DIGIT_LEVELS = 16  # scikit-learn's digits have values 0 to 16, ink high
DIGITS_PER_SIDE = 4
N_TRAIN_DIGITS = 1_437  # four fifths; the last fifth was written by other people
TWO_OBJECTS = 0.5

TRAIN_PHOTOGRAPHS = (
    "skimage/data/astronaut.png",
    "skimage/data/rocket.jpg",
    "skimage/data/motorcycle_left.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/retina.jpg",
    "skimage/data/ihc.png",
    "skimage/data/camera.png",
    "skimage/data/coins.png",
    "skimage/data/grass.png",
    "skimage/data/gravel.png",
    "skimage/data/brick.png",
    "sklearn/datasets/images/china.jpg",
)
VALIDATION_PHOTOGRAPHS = (
    "skimage/data/coffee.png",
    "skimage/data/chelsea.png",
    "sklearn/datasets/images/flower.jpg",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
)


def write_pictures(folder: Path, names: tuple[str, ...], n_train: int, n_validation: int, seed: int) -> None:
    """Writes folder/<name>.npz with uint8 arrays "train" and "validation"; the same seed makes the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        arrays = {
            split: np.stack(list(DATA_SETS[name](split, n, np.random.default_rng([seed, SPLITS.index(split)]))))
            for split, n in zip(SPLITS, (n_train, n_validation), strict=True)
        }
        np.savez(folder / f"{name}.npz", **arrays)


def scenes(split: str, n: int, rng: np.random.Generator) -> Iterator[Pixels]:
    """Scenes of one or two objects, as `dalle-ds make-scenes` draws them."""
    held_out = held_out_combinations(0)
    for _ in range(n):
        n_object = 2 if rng.random() < TWO_OBJECTS else 1
        yield np.asarray(render(draw_scene(rng, n_object, held_out, None), SIZE))


def digits(split: str, n: int, rng: np.random.Generator) -> Iterator[Pixels]:
    """Pages of 4 x 4 handwritten digits, dark on white, each enlarged from 8 x 8 to 16 x 16."""
    from sklearn.datasets import load_digits

    images = load_digits().images
    images = images[:N_TRAIN_DIGITS] if split == "train" else images[N_TRAIN_DIGITS:]
    side = SIZE // DIGITS_PER_SIDE
    cells = [_digit_cell(image, side) for image in images]
    for _ in range(n):
        picks = rng.integers(len(cells), size=(DIGITS_PER_SIDE, DIGITS_PER_SIDE))
        page = np.block([[cells[i] for i in row] for row in picks])
        yield np.repeat(page[..., None], 3, axis=2)


def _digit_cell(image: npt.NDArray[np.float64], side: int) -> Pixels:
    paper = (255 * (1 - image / DIGIT_LEVELS)).round().astype(np.uint8)
    return np.asarray(Image.fromarray(paper).resize((side, side), Image.Resampling.BICUBIC))


def photographs(split: str, n: int, rng: np.random.Generator) -> Iterator[Pixels]:
    """Square crops of random place and of random side, from SIZE to the whole height, shrunk to SIZE."""
    files = TRAIN_PHOTOGRAPHS if split == "train" else VALIDATION_PHOTOGRAPHS
    images = [Image.open(_in_package(file)).convert("RGB") for file in files]
    for i in range(n):
        image = images[i % len(images)]
        side = round(SIZE * (min(image.size) / SIZE) ** rng.random())
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        box = (left, top, left + side, top + side)
        crop = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX, box=box))
        yield crop[:, ::-1] if rng.random() < 1 / 2 else crop


def _in_package(file: str) -> Path:
    package, _, path = file.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent / path


DATA_SETS: dict[str, Callable[[str, int, np.random.Generator], Iterator[Pixels]]] = {
    "scenes": scenes,
    "digits": digits,
    "photographs": photographs,
}
