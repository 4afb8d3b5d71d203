"""The discrete VAE: the published structure at full size, the loss in the paper's own form, codes in and out."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import run_distributed

from dalle_ds.config import DVAEConfig
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.likelihood import gumbel_softmax, kl_to_uniform, logit_laplace_log_density, map_pixels

CONFIGS = Path(__file__).parents[1] / "ds_configs"
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


RELAXATION_CONVS = ("encoder.blocks.output.conv", "decoder.blocks.input")


def watch(dvae, names):
    """(module, its input, its output) of each of these modules, as the next forward passes fill them in."""
    seen = {}
    for name in names:
        dvae.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: (m, i[0], o)}))
    return seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["16-bit-weights", "autocast"])
def test_in_16_bit_the_relaxation_and_all_after_it_stay_in_float32(dtype, autocast):
    dvae = build_dvae() if autocast else build_dvae().to(dtype)
    seen = watch(dvae, [*RELAXATION_CONVS, "decoder.blocks.group_4.block_1"])
    with torch.autocast("cpu", dtype, enabled=autocast):
        outputs = dvae(draw_images(), 1.0, 1.0, generator=seeded())
    outputs["loss"].backward()
    for name in RELAXATION_CONVS:
        conv, given, made = seen[name]
        # Also under autocast: whole float32 weights, as in the release.
        assert made.equal(F.conv2d(given.float(), conv.w.float(), conv.b.float())), name
    assert seen["decoder.blocks.group_4.block_1"][2].dtype == dtype
    for name in ("loss", "reconstruction", "kl"):
        assert outputs[name].dtype == torch.float32
        assert outputs[name].isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in dvae.parameters())


@pytest.mark.parametrize("cuts", [(2, 2), (1, 1, 1, 1), (3, 1)], ids=str)
def test_the_loss_of_a_batch_is_the_mean_over_any_cut_into_micro_batches(cuts):
    """Weighted by their sizes where those differ; each picture brings its own noise."""
    dvae, images = build_dvae(), draw_images(4)
    names = ("loss", "reconstruction", "kl")

    def run(pictures):
        outputs = dvae(images[pictures], 0.5, 6.6, [seeded(i) for i in pictures])
        outputs["loss"].mul(len(pictures) / 4).backward()
        return torch.stack([outputs[name].detach() for name in names]) * len(pictures) / 4

    whole, gradients = run([0, 1, 2, 3]), [p.grad.clone() for p in dvae.parameters()]
    dvae.zero_grad()
    micro_batches = torch.arange(4).split(cuts)
    # Float32 sums in another order.
    torch.testing.assert_close(sum(run(m.tolist()) for m in micro_batches), whole, rtol=1e-6, atol=0)
    for parameter, gradient in zip(dvae.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def run_and_count(dvae, images):
    """The gradients of a training pass, and the bytes that autograd holds between forward and backward."""
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.data_ptr() for parameter in dvae.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = dvae(images, 0.5, 1.0, generator=seeded())["loss"]
        n_bytes = sum(size for pointer, size in held.items() if pointer not in weights)
    gradients = torch.autograd.grad(loss, list(dvae.parameters()))
    return gradients, n_bytes


@pytest.mark.parametrize("n_blk_per_group", [1, 3])
def test_checkpointed_activations_give_the_same_gradients_from_less_memory(n_blk_per_group):
    config = dataclasses.replace(TINY, n_hid=16, n_blk_per_group=n_blk_per_group)
    plain, images = build_dvae(config), draw_images(1, config)
    lean = DVAE(config, checkpoint_activations=True)
    lean.load_state_dict(plain.state_dict())
    gradients, n_bytes = run_and_count(plain, images)
    lean_gradients, lean_bytes = run_and_count(lean, images)
    for one, other in zip(lean_gradients, gradients, strict=True):
        assert torch.equal(one, other)
    # A block keeps one tensor of its width instead of that and three of a quarter; the rest is poolings and the loss.
    assert lean_bytes < (0.8 if n_blk_per_group == 1 else 0.6) * n_bytes
    # Evaluation has nothing to save: it runs the same operations once.
    assert torch.equal(lean.eval().logits(map_pixels(images)), plain.logits(map_pixels(images)))


def train_tiny(config, checkpoint_activations, kl_weights):
    """Losses, loss scales and last weights of some steps under DeepSpeed, the KL weight of each given."""
    from dalle_ds.training.construction import build_engine
    from dalle_ds.training.engine import backward

    engine = build_engine(
        lambda precision: DVAE(SMALLEST, checkpoint_activations=checkpoint_activations), config, seed=0
    )
    images, losses, scales = draw_images(1, SMALLEST), [], []
    for step, kl_weight in enumerate(kl_weights):
        loss = engine(images, 1.0, kl_weight, generator=seeded(step))["loss"]
        backward(engine, loss)
        engine.step()
        losses.append(loss.item())
        scales.append(float(getattr(engine.optimizer, "loss_scale", 1.0)))
    weights = [p.detach().clone() for p in engine.module.parameters()]
    engine.destroy()
    return losses, scales, weights


SMALLEST = DVAEConfig(image_size=8, n_hid=4, n_blk_per_group=1, n_init=4, vocab_size=8)


def load_ready(name, stage):
    """A ready DeepSpeed JSON, with one picture a process and this ZeRO stage."""
    config = json.loads((CONFIGS / name).read_text())
    del config["train_batch_size"]
    config |= {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    if stage == 0:
        config.pop("data_types", None)
    return config


def train_in_every_precision():
    from dalle_ds.training.distributed import process_group

    # Overflows in half precision at the first step, whatever the weights.
    kl_weights = [1e9, 1.0, 1.0, 1.0]
    float32 = {key: value for key, value in load_ready("dvae_fp16.json", 0).items() if key != "fp16"}
    found = {}
    with process_group():
        for stage in (0, 1, 2):
            config = {**float32, "zero_optimization": {"stage": stage}}
            found["fp32", stage] = [train_tiny(config, checkpoint, kl_weights) for checkpoint in (False, True)]
            fp16 = load_ready("dvae_fp16.json", stage)
            fp16["fp16"]["hysteresis"] = 1
            found["fp16", stage] = [train_tiny(fp16, True, kl_weights)]
        for stage in (0, 1, 2):  # last, for DeepSpeed's autocast stays on in its process
            found["bf16", stage] = [train_tiny(load_ready("dvae_bf16.json", stage), True, kl_weights)]
    return found


@pytest.mark.slow
def test_the_ready_configurations_train_at_zero_0_to_2_with_checkpointed_activations():
    found, by_other_rank = run_distributed(train_in_every_precision, 2)
    reference, _, _ = found["fp32", 0][0]
    # 10 bits of a half and 7 of a bfloat16, through a net of small weights.
    bounds = {"fp32": 1e-6, "fp16": 2e-2, "bf16": 5e-2}
    stored = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.float32}
    for (precision, stage), runs in found.items():
        for (losses, scales, weights), (_, _, others) in zip(runs, by_other_rank[precision, stage], strict=True):
            where = (precision, stage)
            assert losses == [pytest.approx(loss, rel=bounds[precision]) for loss in reference], where
            assert len(set(losses)) == len(losses), where
            # One scale for all parameters: halved by the overflow of the first step, and kept by the others.
            assert scales == [2.0**15 if precision == "fp16" else 1.0] * len(losses), where
            assert {weight.dtype for weight in weights} == {stored[precision]}, where
            assert all(map(torch.equal, weights, others)), where
    for stage in (0, 1, 2):
        plain, lean = found["fp32", stage]
        assert plain[0] == lean[0]
        assert all(map(torch.equal, plain[2], lean[2]))


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
