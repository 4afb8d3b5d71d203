"""Made scenes as captions and image tokens, in seconds and without a dVAE: six words, and k-means of squares."""

import functools

import numpy as np
import torch
from parts.demo_tokens import Tokens
from torch import Tensor

from dalle_ds.data.scenes import Scene, draw_scene, held_out_combinations, render
from dalle_ds.models.codebook import k_means

IMAGE_SIZE, SQUARE = 32, 8
VOCAB_SIZE = 64
N_FITTED = 8_000  # squares
WHITE = 255.0


@functools.cache
def make_tokens(n_train: int, n_validation: int) -> tuple[Tokens, Tokens]:
    """Samples of one object each; the two sets share no scene. The codebook is that of the first."""
    scenes = [_draw(split, n) for split, n in enumerate((n_train, n_validation))]
    captions = [[_words(scene) for scene in of_split] for of_split in scenes]
    squares = [torch.stack([_squares(scene) for scene in of_split]) for of_split in scenes]
    words = sorted({word for of_split in captions for caption in of_split for word in caption})
    generator = torch.Generator().manual_seed(0)
    fitted = squares[0].flatten(0, 1)
    centres = k_means(
        fitted[torch.randperm(len(fitted), generator=generator)[:N_FITTED]], VOCAB_SIZE, generator
    )  # [VOCAB_SIZE, 3 * SQUARE**2]
    train, validation = (
        Tokens(
            text=torch.tensor([[words.index(word) for word in caption] for caption in of_split]),
            lengths=torch.full((len(of_split),), len(of_split[0])),
            codes=torch.stack([torch.cdist(picture, centres).argmin(1) for picture in pictures]),
            text_vocab_size=len(words),
            image_vocab_size=VOCAB_SIZE,
            grid_size=IMAGE_SIZE // SQUARE,
        )
        for of_split, pictures in zip(captions, squares, strict=True)
    )
    return train, validation


def _draw(split: int, n: int) -> list[Scene]:
    return [draw_scene(np.random.default_rng([split, i]), 1, held_out_combinations(0), None) for i in range(n)]


def _words(scene: Scene) -> list[str]:
    [item] = scene.objects
    return [item.size, item.colour, item.shape, item.place, scene.background.tone, scene.background.texture]


def _squares(scene: Scene) -> Tensor:
    """The picture's squares, row by row: [(IMAGE_SIZE / SQUARE)**2, 3 * SQUARE**2], in 0 .. 1."""
    pixels = torch.from_numpy(np.array(render(scene, IMAGE_SIZE))) / WHITE  # [S, S, 3]
    n = IMAGE_SIZE // SQUARE
    return pixels.view(n, SQUARE, n, SQUARE, 3).transpose(1, 2).reshape(n * n, -1)
