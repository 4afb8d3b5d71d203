"""Ours against the authors' released encoder and decoder: the same names, the same weights, the same bits."""

import dall_e
import pytest
import torch
import torch.nn.functional as F

from dalle_ds.config import DVAEConfig
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.likelihood import map_pixels, unmap_pixels

# The least that the release builds.
N_HID, VOCAB_SIZE, N_INIT = 64, 512, 8
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels-last"]
)


def build_released(n_blk_per_group=1):
    """Encoder and decoder of the release under random weights; its biases begin at 0, so they are drawn too."""
    torch.manual_seed(n_blk_per_group)
    sizes = {"n_hid": N_HID, "n_blk_per_group": n_blk_per_group, "vocab_size": VOCAB_SIZE}
    encoder, decoder = dall_e.Encoder(**sizes), dall_e.Decoder(n_init=N_INIT, **sizes)
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter)
    return encoder, decoder


def build_ours(encoder, decoder, config):
    with torch.device("meta"):
        dvae = DVAE(config)
    dvae.encoder.load_state_dict(encoder.state_dict(), assign=True)
    dvae.decoder.load_state_dict(decoder.state_dict(), assign=True)
    return dvae


def build_pair(n_blk_per_group=1):
    encoder, decoder = build_released(n_blk_per_group)
    config = DVAEConfig(
        image_size=32, n_hid=N_HID, n_blk_per_group=n_blk_per_group, n_init=N_INIT, vocab_size=VOCAB_SIZE
    )
    return encoder, decoder, build_ours(encoder, decoder, config)


def draw_mapped(n, size):
    return map_pixels(torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0)))


def make_token_weights(vocab_size, grid_size, n=1):
    """Token weights as they come: one-hot from codes, and soft from a relaxation."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(vocab_size, (n, grid_size, grid_size), generator=generator)
    soft = torch.randn(n, vocab_size, grid_size, grid_size, generator=generator).mul(3).softmax(1)
    return {"one-hot": F.one_hot(codes, vocab_size).permute(0, 3, 1, 2).float(), "soft": soft}


@LAYOUTS
@pytest.mark.parametrize("n_blk_per_group", [1, 2, 3])  # 3: the gain 1/144 is no power of two
@torch.no_grad()
def test_encoder_and_decoder_give_the_bits_of_the_release(n_blk_per_group, layout):
    encoder, decoder, dvae = build_pair(n_blk_per_group)
    x = draw_mapped(2, 32).contiguous(memory_format=layout)
    encoder.to(memory_format=layout), decoder.to(memory_format=layout)
    wanted = encoder(x)
    assert wanted.std() > 0.1
    assert torch.equal(dvae.encoder(x), wanted)
    # Ours keeps its weights in rows, as checkpoints and DeepSpeed do: the picture's layout decides.
    for name, made in make_token_weights(VOCAB_SIZE, 4, n=2).items():
        weights = made.contiguous(memory_format=layout)
        assert torch.equal(dvae.decoder(weights), decoder(weights)), name


def test_pictures_and_codes_go_in_and_out_as_in_the_notebook_of_the_release():
    encoder, decoder, dvae = build_pair()
    pictures = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    x = dall_e.map_pixels(pictures.float() / 255)
    assert torch.equal(map_pixels(pictures), x)
    with torch.no_grad():
        codes = encoder(x).argmax(1)
        one_hot = F.one_hot(codes, VOCAB_SIZE).permute(0, 3, 1, 2).float()
        shown = dall_e.unmap_pixels(torch.sigmoid(decoder(one_hot).float()[:, :3]))
    assert dvae.encode(pictures).equal(codes)
    assert dvae.decode(codes).equal((shown * 255).round().to(torch.uint8))
    assert torch.equal(unmap_pixels(x), pictures)


def test_loss_and_gradients_equal_those_of_a_plain_loop_around_the_release():
    encoder, decoder, dvae = build_pair(3)
    pictures = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    loss = dvae(pictures, None)["reconstruction"]
    x = dall_e.map_pixels(pictures.float() / 255)
    mu, log_b = decoder(encoder(x)).chunk(2, dim=1)
    b = log_b.exp()
    plain = ((torch.logit(x) - mu).abs() / b + torch.log(2 * b * x * (1 - x))).mean()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    ours = torch.autograd.grad(loss, list(dvae.parameters()))
    theirs = torch.autograd.grad(plain, [*encoder.parameters(), *decoder.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        # Sums of float32 in another order.
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_the_full_size_has_the_names_shapes_counts_and_gains_of_the_release():
    released = {"encoder": build_on_meta(dall_e.Encoder), "decoder": build_on_meta(dall_e.Decoder)}
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig())
    for part, count in (("encoder", 53_786_240), ("decoder", 43_829_766)):
        ours, theirs = dvae.get_submodule(part), released[part]
        shapes = [(name, p.shape) for name, p in theirs.named_parameters()]
        assert [(name, p.shape) for name, p in ours.named_parameters()] == shapes
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert sum(p.numel() for p in ours.parameters()) == count
        gains = {name: m.post_gain for name, m in theirs.named_modules() if hasattr(m, "post_gain")}
        assert {name: m.post_gain for name, m in ours.named_modules() if hasattr(m, "post_gain")} == gains


def build_on_meta(module_type):
    return module_type(device=torch.device("meta"))


@pytest.mark.slow
@torch.no_grad()
def test_the_full_size_gives_the_bits_of_the_release():
    """At 256x256 with the paper's sizes; pictures in rows and weights as each comes, as the release is used."""
    torch.manual_seed(0)
    x = draw_mapped(1, 256)
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig())
    encoder = dall_e.Encoder()
    dvae.encoder.load_state_dict(encoder.state_dict(), assign=True)
    assert torch.equal(dvae.encoder(x), encoder(x))
    del encoder, dvae.encoder
    decoder = dall_e.Decoder()
    dvae.decoder.load_state_dict(decoder.state_dict(), assign=True)
    one_hot, soft = make_token_weights(8192, 32).values()
    weights = torch.cat([one_hot[..., :16], soft[..., 16:]], dim=-1)  # both at once, for time
    assert torch.equal(dvae.decoder(weights), decoder(weights))
