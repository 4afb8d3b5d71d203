"""The codebook made by k-means: its centres, its sharpness, and that nothing but the tokens changes."""

import copy
import math

import pytest
import torch

from dalle_ds.config import DVAEConfig
from dalle_ds.models.codebook import START_KL, k_means, make_codebook
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.likelihood import map_pixels

VOCAB_SIZE = 32
# Bisection of the scale stops far below this; what is left is float32 in the softmax.
KL_TOLERANCE = 1e-3


def make_dvae(vocab_size=VOCAB_SIZE):
    torch.manual_seed(0)
    return DVAE(DVAEConfig(image_size=16, n_hid=8, n_blk_per_group=1, n_init=16, vocab_size=vocab_size, post_gain=0.25))


def make_images(n):
    """Pictures of coloured noise: no two cells are alike."""
    return torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def trunk_input(dvae, images):
    """What the decoder's trunk receives from a dVAE without relaxation: [cells, n_init]."""
    return dvae.decoder.blocks.input(dvae.logits(map_pixels(images))).permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def mean_kl(dvae, images):
    log_q = torch.log_softmax(dvae.logits(map_pixels(images)), dim=1)
    return math.log(log_q.shape[1]) + float((log_q.exp() * log_q).sum(1).mean())


@pytest.mark.parametrize("vocab_size", [8, VOCAB_SIZE])
def test_the_mean_kl_is_the_stated_fraction_of_its_largest_value(vocab_size):
    dvae, images = make_dvae(vocab_size), make_images(50)
    make_codebook(dvae, images)
    assert mean_kl(dvae, images) == pytest.approx(START_KL * math.log(vocab_size), abs=KL_TOLERANCE)


def test_most_tokens_are_used_where_hardly_one_was():
    dvae, images = make_dvae(), make_images(50)
    make_codebook(dvae, images)
    assert len(dvae.encode(images).unique()) > 0.9 * VOCAB_SIZE


def test_each_cell_takes_the_token_of_its_nearest_centre():
    dvae, images = make_dvae(), make_images(50)
    z = trunk_input(dvae, images)
    make_codebook(dvae, images)
    centres = dvae.decoder.blocks.input.w[:, :, 0, 0].T
    nearest = torch.cdist(z, centres).argmin(1)
    # Cells as near to two centres as float32 can tell may go either way.
    assert (dvae.encode(images).flatten() == nearest).float().mean() > 0.99
    error = (z - centres[nearest]).square().sum(1).mean()
    assert error < (z - z.mean(0)).square().sum(1).mean() / 2


def test_with_a_token_for_each_cell_pictures_are_as_without_tokens():
    dvae, images = make_dvae(), make_images(VOCAB_SIZE // 4)  # of 2 x 2 cells
    with torch.no_grad():
        before = dvae.decoder(dvae.logits(map_pixels(images)))
    trunk = copy.deepcopy(dvae.decoder.blocks[1:].state_dict())
    make_codebook(dvae, images)
    codes = dvae.encode(images)
    assert len(codes.unique()) == VOCAB_SIZE
    with torch.no_grad():
        after = dvae.decoder(torch.nn.functional.one_hot(codes, VOCAB_SIZE).permute(0, 3, 1, 2).float())
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))
    for name, tensor in dvae.decoder.blocks[1:].state_dict().items():
        assert tensor.equal(trunk[name]), name


def test_the_seed_decides_the_codebook():
    made = []
    for seed in (0, 0, 1):
        dvae = make_dvae()
        make_codebook(dvae, make_images(50), seed)
        made.append(dvae.state_dict())
    assert all(tensor.equal(made[1][name]) for name, tensor in made[0].items())
    assert not made[0]["decoder.blocks.input.w"].equal(made[2]["decoder.blocks.input.w"])


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_every_planted_cluster(seed):
    generator = torch.Generator().manual_seed(seed)
    planted = 10 * torch.eye(6)
    points = (planted.repeat(50, 1) + 0.1 * torch.randn(300, 6, generator=generator))[torch.randperm(300)]
    centres = k_means(points, 6, generator)
    # A mean of 50 points with deviation 0.1 in 6 dimensions.
    assert torch.cdist(planted, centres).min(1).values.max() < 0.1


def test_k_means_of_fewer_distinct_points_than_centres_repeats_them():
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(10, 1)
    centres = k_means(points, 4, torch.Generator().manual_seed(0))
    assert centres.shape == (4, 2)
    assert centres.isfinite().all()
    assert torch.cdist(points, centres).min(1).values.max() == 0
