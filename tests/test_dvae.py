"""The discrete VAE: the published structure at full size, the loss in the paper's own form, codes in and out."""

import dataclasses
import math

import pytest
import torch

from dalle_ds.config import DVAEConfig
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.likelihood import gumbel_softmax, kl_to_uniform, logit_laplace_log_density, map_pixels

TINY = DVAEConfig(image_size=32, n_hid=8, n_blk_per_group=1, n_init=8, vocab_size=16)


def build_dvae(config=TINY, seed=0):
    torch.manual_seed(seed)
    return DVAE(config)


def draw_images(n=2, config=TINY):
    shape = (n, 3, config.image_size, config.image_size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return DVAE(DVAEConfig())


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_full_size_has_the_published_parameter_counts(full_size):
    assert count(full_size.encoder) == 53_786_240
    assert count(full_size.decoder) == 43_829_766


def test_full_size_names_and_shapes_follow_the_release(full_size):
    shapes = {name: tuple(p.shape) for name, p in full_size.named_parameters()}
    expected = {
        "encoder.blocks.input.w": (256, 3, 7, 7),
        "encoder.blocks.group_1.block_1.res_path.conv_1.w": (64, 256, 3, 3),
        "encoder.blocks.group_2.block_1.id_path.w": (512, 256, 1, 1),
        "encoder.blocks.group_2.block_1.id_path.b": (512,),
        "encoder.blocks.group_4.block_2.res_path.conv_4.w": (2048, 512, 1, 1),
        "encoder.blocks.output.conv.w": (8192, 2048, 1, 1),
        "decoder.blocks.input.w": (128, 8192, 1, 1),
        "decoder.blocks.group_1.block_1.res_path.conv_1.w": (512, 128, 1, 1),
        "decoder.blocks.group_4.block_2.res_path.conv_4.w": (256, 64, 3, 3),
        "decoder.blocks.output.conv.w": (6, 256, 1, 1),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    # 16 resblocks of 4 convolutions, 7 of which change the width; 4 convolutions outside; a weight and a bias each.
    assert len(shapes) == 2 * (16 * 4 + 7 + 4)
    modules = dict(full_size.named_modules())
    for i in (1, 2, 3):
        assert f"encoder.blocks.group_{i}.pool" in modules
        assert f"decoder.blocks.group_{i}.upsample" in modules
    assert "encoder.blocks.group_4.pool" not in modules
    assert "encoder.blocks.group_2.block_2.id_path.w" not in shapes


def test_full_size_shapes_of_activations(full_size):
    images = torch.empty(2, 3, 256, 256, device="meta")
    logits = full_size.encoder(images)
    assert logits.shape == (2, 8192, 32, 32)
    assert full_size.decoder(logits).shape == (2, 6, 256, 256)


def test_every_resblock_of_the_full_size_adds_a_64th_of_its_branch(full_size):
    gains = [module.post_gain for module in full_size.modules() if hasattr(module, "post_gain")]
    assert gains == [1 / 64] * 16


def test_convolutions_start_with_unit_gain_and_no_bias():
    conv = build_dvae(DVAEConfig(image_size=32, n_hid=64)).encoder.blocks.group_1.block_1.res_path.conv_1
    # 9,216 weights: the relative error of their deviation is 1 / sqrt(2 * 9216) = 0.7%; five times that.
    assert conv.w.std().item() * (64 * 9) ** 0.5 == pytest.approx(1, abs=0.037)
    assert conv.b.eq(0).all()


def test_a_resblock_is_its_input_plus_its_scaled_branch():
    block = build_dvae().encoder.blocks.group_2.block_1
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(block(x), block.id_path(x) + block.post_gain * block.res_path(x))


def test_loss_equals_the_sum_form_of_the_paper():
    """Section 2.1: sums over colour values and cells, divided by the number of colour values; a mean over images."""
    dvae, images, temperature, kl_weight = build_dvae(), draw_images(), 0.7, 6.6
    outputs = dvae(images, temperature, kl_weight, generator=seeded())
    x = map_pixels(images)
    logits = dvae.encoder(x)
    mu, log_b = dvae.decoder(gumbel_softmax(logits, temperature, seeded())).chunk(2, dim=1)
    likelihood = logit_laplace_log_density(x, mu, log_b).double().sum((1, 2, 3))
    kl = kl_to_uniform(logits).double().sum((1, 2))
    expected = ((-likelihood + kl_weight * kl) / (3 * 32 * 32)).mean()
    assert outputs["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    # The equal form: a mean over cells weighted by cells per colour value (1 / 192 whatever the image size).
    by_cell = outputs["reconstruction"] + kl_weight / 192 * kl_to_uniform(logits).mean()
    assert outputs["loss"].item() == pytest.approx(by_cell.item(), rel=1e-5)


def test_kl_term_does_not_depend_on_batch_size_temperature_or_noise():
    dvae, image = build_dvae(), draw_images(1)
    one = dvae(image, 1.0, 1.0, generator=seeded(1))["kl"].item()
    assert dvae(image.expand(4, -1, -1, -1), 1.0, 1.0, generator=seeded(2))["kl"].item() == pytest.approx(one, rel=1e-5)
    assert dvae(image, 1 / 16, 1.0, generator=seeded(3))["kl"].item() == pytest.approx(one, rel=1e-5)


def test_the_same_generator_seed_gives_the_same_loss():
    dvae, images = build_dvae(), draw_images()
    losses = [dvae(images, 1.0, 1.0, generator=seeded(seed))["loss"].item() for seed in (5, 5, 6)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_every_parameter_gets_a_finite_gradient():
    dvae = build_dvae()
    dvae(draw_images(), 1.0, 6.6, generator=seeded())["loss"].backward()
    for name, parameter in dvae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.ne(0).any(), name


def test_encode_gives_the_likeliest_codes_that_forward_gives():
    dvae, images = build_dvae(), draw_images()
    codes = dvae.encode(images)
    assert codes.shape == (2, 4, 4)
    assert codes.dtype == torch.int64
    assert codes.equal(dvae.encoder(map_pixels(images)).argmax(1))
    assert codes.equal(dvae(images, 1.0, 1.0, generator=seeded())["codes"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16])
def test_decode_takes_codes_of_any_integer_dtype_and_gives_bytes(dtype):
    dvae = build_dvae()
    codes = torch.arange(16).view(1, 4, 4)
    images = dvae.decode(codes.to(dtype))
    assert images.shape == (1, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert images.equal(dvae.decode(codes))


def test_decode_shows_the_median_and_ignores_the_scale():
    """Appendix A.3: the shown picture is the inverse mapping of sigmoid(mu)."""
    dvae, codes = build_dvae(), torch.arange(16).view(1, 4, 4)
    before = dvae.decode(codes)
    with torch.no_grad():
        dvae.decoder.blocks.output.conv.b[3:] += 5.0
    assert dvae.decode(codes).equal(before)
    with torch.no_grad():
        dvae.decoder.blocks.output.conv.b[:3] += 50.0
    assert dvae.decode(codes).eq(255).all()


@pytest.mark.parametrize("image_size", [8, 24, 64])
def test_any_size_that_three_poolings_halve_works(image_size):
    config = DVAEConfig(image_size=image_size, n_hid=8, n_blk_per_group=1, n_init=8, vocab_size=16)
    dvae, images = build_dvae(config), draw_images(1, config)
    assert dvae.encode(images).shape == (1, config.grid_size, config.grid_size)
    assert dvae.decode(dvae.encode(images)).shape == images.shape


def test_half_precision_weights_keep_the_relaxation_in_float32():
    dvae = build_dvae().bfloat16()
    seen = {}
    for name in ("encoder.blocks.output.conv", "decoder.blocks.input"):
        dvae.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.dtype}))
    loss = dvae(draw_images(), 1.0, 1.0, generator=seeded())["loss"]
    assert set(seen.values()) == {torch.float32}
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_the_constants_that_the_paper_fixes_can_be_set():
    config = DVAEConfig(image_size=32, n_hid=8, n_init=8, vocab_size=16, post_gain=0.5)
    dvae = build_dvae(config)
    assert {module.post_gain for module in dvae.modules() if hasattr(module, "post_gain")} == {0.5}


def test_a_floor_under_the_scale_is_the_density_with_that_scale():
    images = draw_images(2)
    config = DVAEConfig(image_size=32, n_hid=8, n_init=8, vocab_size=16)
    plain = build_dvae(config)
    floored = build_dvae(dataclasses.replace(config, min_scale=3.0))
    floored.load_state_dict(plain.state_dict())
    with torch.no_grad():  # b = 0.01 everywhere, far below the floor
        for dvae in (plain, floored):
            dvae.decoder.blocks.output.conv.w[3:] = 0
            dvae.decoder.blocks.output.conv.b[3:] = math.log(0.01)
        mu = plain.decoder(plain.logits(map_pixels(images)))[:, :3]
        wanted = -logit_laplace_log_density(map_pixels(images), mu, torch.full_like(mu, math.log(3.0))).mean()
        # Without relaxation mu is fixed by the pictures, so that the two densities can be compared.
        assert floored(images, None)["reconstruction"].item() == pytest.approx(wanted.item(), rel=1e-5)
        assert plain(images, None)["reconstruction"].item() > wanted.item()


def test_without_a_temperature_the_loss_fits_mu_by_squares_and_b_by_the_density():
    images = draw_images(2)
    dvae = build_dvae(DVAEConfig(image_size=32, n_hid=8, n_init=8, vocab_size=16))
    x = map_pixels(images)
    mu, log_b = dvae.decoder(dvae.logits(x)).chunk(2, dim=1)
    density = logit_laplace_log_density(x, mu, log_b).mean()
    loss = dvae(images, None)["loss"]
    assert loss.item() == pytest.approx((5 * (torch.logit(x) - mu).square().mean() - density).item(), rel=1e-5)
    # The gradient of mu is that of the squares alone: the density sees it detached.
    loss.backward()
    bias = dvae.decoder.blocks.output.conv.b.grad[:3]
    torch.testing.assert_close(bias, (10 * (mu - torch.logit(x))).mean((0, 2, 3)).detach() / 3, rtol=1e-4, atol=1e-6)
