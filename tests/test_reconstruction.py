"""What a dVAE keeps of pictures: the bounds against direct sums, PSNR and SSIM against numpy, and `reconstruct`."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_here
from PIL import Image

from dalle_ds.cli import main
from dalle_ds.config import DVAEConfig
from dalle_ds.data.writer import ShardWriter
from dalle_ds.evaluation.reconstruction import (
    DRAWN,
    LIKELIEST,
    Meter,
    byte_log_probability,
    codebook_figures,
    measure,
    psnr,
    relaxed_name,
    ssim,
)
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.likelihood import kl_to_uniform, logit_laplace_log_density, map_pixels
from dalle_ds.models.weights import write_weights

TINY = DVAEConfig(image_size=32, n_hid=8, n_blk_per_group=1, n_init=8, vocab_size=16, post_gain=0.5)
ONE_CELL = dataclasses.replace(TINY, image_size=8, vocab_size=4)


def make_dvae(config=TINY, spread=1.0):
    """Untrained, its logits multiplied by `spread`, its weights the same each time."""
    torch.manual_seed(0)
    dvae = DVAE(config).eval()
    with torch.no_grad():
        dvae.encoder.blocks.output.conv.w.mul_(spread)
        dvae.decoder.blocks.input.w.mul_(5)
    return dvae


def draw_images(n, size=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def write_dvae_run(run, dvae):
    """A run folder as training writes it, with one checkpoint."""
    about = {"kind": "dvae", "version": "0", "config": {"model": dataclasses.asdict(dvae.config)}}
    write_weights(run, about, 1, dvae.state_dict().items())
    return run


# --- bounds -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def direct_densities(dvae, image):
    """ln f(x|z) summed over the picture [3, 8, 8], for every token z of its one cell: [K]."""
    one_hot = torch.eye(dvae.config.vocab_size)[:, :, None, None]
    mu, log_b = dvae.decoder(one_hot).chunk(2, dim=1)
    return logit_laplace_log_density(map_pixels(image), mu, log_b).flatten(1).double().sum(1)


def test_the_bounds_of_a_model_of_one_cell_are_those_of_direct_sums():
    dvae, n = make_dvae(ONE_CELL, spread=2), 2_000
    [image] = draw_images(1, size=8)
    densities = direct_densities(dvae, image)
    q = torch.softmax(dvae.logits(map_pixels(image[None])).double().flatten(), 0).detach()
    assert q.max() < 0.9  # else the draws would show little
    kl = float((q * (q * 4).log()).sum())
    terms = measure(dvae, image.expand(n, 3, 8, 8), [], range(n)).terms
    drawn = -terms[DRAWN].reconstruction.double() * image.numel()
    # Every draw is the density of one of the four tokens, and each token comes as often as q says: 5 deviations.
    distance, token = (drawn[:, None] - densities).abs().min(1)
    assert float(distance.max()) < 1e-3  # of hundreds of nats, in float32
    frequency = torch.bincount(token, minlength=4) / n
    assert ((frequency - q).abs() < 5 * (q * (1 - q) / n).sqrt()).all()
    assert terms[DRAWN].kl.double().mean() * image.numel() == pytest.approx(kl, rel=1e-5)
    likeliest = -(terms[LIKELIEST].reconstruction + terms[LIKELIEST].kl)[0].double() * image.numel()
    assert float(likeliest) == pytest.approx(float(densities[q.argmax()]) - math.log(4), rel=1e-5)


def test_both_bounds_of_the_discrete_model_lie_below_the_evidence():
    dvae = make_dvae(ONE_CELL, spread=2)
    for image in draw_images(10, size=8):
        densities = direct_densities(dvae, image)
        evidence = float(torch.logsumexp(densities - math.log(4), 0))
        q = torch.softmax(dvae.logits(map_pixels(image[None])).double().flatten(), 0).detach()
        terms = measure(dvae, image[None], [], [0]).terms
        elbo = float((q * densities).sum()) - float(terms[DRAWN].kl) * image.numel()
        likeliest = -float(terms[LIKELIEST].reconstruction + terms[LIKELIEST].kl) * image.numel()
        # 1e-3: float32 sums of hundreds of nats.
        assert max(elbo, likeliest) <= evidence + 1e-3


@pytest.mark.parametrize("min_scale", [0.0, 1.5])
def test_the_relaxed_terms_are_those_of_the_training_loss_picture_by_picture(min_scale):
    """At a temperature so high that every token weighs the same, whatever the noise."""
    dvae, images = make_dvae(dataclasses.replace(TINY, min_scale=min_scale)), draw_images(3)
    terms = measure(dvae, images, [1e6], [7, 8, 9]).terms[relaxed_name(1e6)]
    for i in range(3):
        with torch.no_grad():
            loss = dvae(images[i : i + 1], 1e6, 1.0)
        # float32 sums in another order, and weights that differ by 1e-5 of themselves.
        assert float(terms.reconstruction[i]) == pytest.approx(float(loss["reconstruction"]), abs=1e-4)
        assert float(terms.kl[i]) == pytest.approx(float(loss["kl"]), rel=1e-5)


def test_the_relaxed_bound_comes_to_the_drawn_one_as_the_temperature_falls():
    dvae, images = make_dvae(spread=3), draw_images(4)
    terms = measure(dvae, images, [1.0, 0.1, 1e-4], range(4)).terms
    gaps = [
        float((terms[relaxed_name(t)].reconstruction - terms[DRAWN].reconstruction).abs().max())
        for t in (1.0, 0.1, 1e-4)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    # Of 64 cells one may have its two best tokens within a few temperatures of each other.
    assert gaps[2] < 1e-3


def test_what_is_measured_are_the_codes_and_pictures_that_encode_and_decode_give():
    dvae, images = make_dvae(), draw_images(4)
    measured = measure(dvae, images, [], range(4))
    codes = dvae.encode(images)
    assert measured.codes.equal(codes)
    assert measured.rebuilt.equal(dvae.decode(codes))


def test_the_figures_do_not_depend_on_the_batch_size_and_do_on_the_seed():
    dvae, images = make_dvae(), draw_images(7)
    meters = [Meter(dvae, [0.5, 0.5], seed=seed) for seed in (0, 0, 1)]
    for meter, batch_size in zip(meters, (7, 2, 7), strict=True):
        for part in images.split(batch_size):
            meter.add(part)
    whole, parts, other = ({row["name"]: row["value"] for row in meter.figures()} for meter in meters)
    # Convolutions of another batch size may round otherwise.
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-7)
    assert other["PSNR (dB)"] == whole["PSNR (dB)"]
    assert other["ELBO, drawn (bits a dimension)"] != whole["ELBO, drawn (bits a dimension)"]
    assert [row["n"] for row in meters[0].figures()] == [7] * len(whole)


def test_the_rows_of_terms_add_up_in_nats_and_in_bits():
    dvae, images = make_dvae(), draw_images(3)
    meter = Meter(dvae, [0.5])
    meter.add(images)
    rows = meter.bounds()
    assert [row["decoder"] for row in rows] == ["relaxed at 0.5", DRAWN, LIKELIEST]
    assert [row["is_bound"] for row in rows] == [False, True, True]
    for row in rows:
        for unit in ("nats", "bits"):
            assert row[f"elbo_{unit}"] == pytest.approx(-row[f"reconstruction_{unit}"] - row[f"kl_{unit}"])
        for term in ("reconstruction", "kl", "elbo", "bytes"):
            assert row[f"{term}_nats"] == pytest.approx(row[f"{term}_bits"] * math.log(2))
    cells = kl_to_uniform(dvae.logits(map_pixels(images)).detach()).mean()
    assert rows[0]["kl_nats_per_cell"] == pytest.approx(float(cells), rel=1e-5)
    assert rows[2]["kl_nats_per_cell"] == pytest.approx(math.log(16), rel=1e-6)
    gaps = {row["name"]: row["value"] for row in meter.figures() if "gap" in row["name"]}
    assert gaps["ELBO gap, relaxed at 0.5 minus drawn (bits a dimension)"] == pytest.approx(
        rows[0]["elbo_bits"] - rows[1]["elbo_bits"]
    )


# --- probability of bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [-9.0, -1.3, 0.0, 0.7, 30.0])
@pytest.mark.parametrize("log_b", [-12.0, -3.0, 0.0, 4.0])
def test_the_probabilities_of_all_bytes_add_up_to_one_and_none_is_infinite(mu, log_b):
    pixels = torch.arange(256, dtype=torch.uint8)
    log_p = byte_log_probability(pixels, torch.full((256,), mu), torch.full((256,), log_b))
    assert log_p.isfinite().all()
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)  # float64


def test_the_probability_of_a_byte_is_the_integral_of_the_density_over_its_share():
    mu, log_b = torch.tensor(0.4, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    for byte in (1, 77, 128, 200, 254):
        width = 0.8 / 255
        # Midpoints of 2,000 strips; the kink of the density is inside one of them at most.
        x = 0.1 + width * (byte - 0.5) + width * (torch.arange(2_000, dtype=torch.float64) + 0.5) / 2_000
        integral = logit_laplace_log_density(x, mu, log_b).exp().mean() * width
        log_p = byte_log_probability(torch.tensor(byte, dtype=torch.uint8), mu, log_b)
        assert float(log_p) == pytest.approx(float(integral.log()), abs=1e-5)


# --- pictures against pictures ----------------------------------------------------------------------------------------


def numpy_ssim(first, second):
    """Of uint8 [3, S, S]: every window of 11 x 11 by itself, in float64."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for a, b in zip(first / 255, second / 255, strict=True):
        views = [
            np.lib.stride_tricks.sliding_window_view(np.pad(plane, 5, mode="reflect"), (11, 11)) for plane in (a, b)
        ]
        means = [(view * window).sum((2, 3)) for view in views]
        spreads = [
            ((view - mean[..., None, None]) ** 2 * window).sum((2, 3)) for view, mean in zip(views, means, strict=True)
        ]
        common = (views[0] - means[0][..., None, None]) * (views[1] - means[1][..., None, None])
        covariance = (common * window).sum((2, 3))
        luminance = (2 * means[0] * means[1] + 0.01**2) / (means[0] ** 2 + means[1] ** 2 + 0.01**2)
        values.append(luminance * (2 * covariance + 0.03**2) / (spreads[0] + spreads[1] + 0.03**2))
    return np.mean(values)


@pytest.fixture(scope="module")
def pairs():
    """Noise against noise, noise against itself blurred, nearly white against white, a picture against itself."""
    first = draw_images(4, size=24)
    first[2] = 254
    second = draw_images(4, size=24, seed=2)
    second[1] = F.avg_pool2d(first[1].float(), 3, 1, 1).to(torch.uint8)
    second[2] = 255
    second[3] = first[3]
    return first, second


def test_psnr_is_that_of_numpy_and_finite_for_equal_pictures(pairs):
    values = psnr(*pairs)
    for value, first, second in zip(values, *(stack.double().numpy() for stack in pairs), strict=True):
        error = ((first - second) ** 2).mean() or 1 / first.size
        assert float(value) == pytest.approx(10 * np.log10(255**2 / error), rel=1e-12)


def test_ssim_is_that_of_numpy_and_one_for_equal_pictures(pairs):
    values = ssim(*pairs)
    for value, first, second in zip(values, *(stack.numpy() for stack in pairs), strict=True):
        # In float32 the variance of a bright flat picture is off by 1e-7, beside a constant of 9e-4.
        assert float(value) == pytest.approx(numpy_ssim(first, second), abs=5e-4)
    assert float(values[3]) == pytest.approx(1, abs=1e-6)


def test_codebook_figures_of_known_counts():
    figures = codebook_figures(torch.tensor([4, 2, 1, 1, 0, 0, 0, 0]))
    assert figures["codebook use"] == 0.5
    assert figures["codebook perplexity"] == pytest.approx(2**1.75)  # entropy 1/2 + 2/4 + 2 * 3/8 bits
    assert figures["commonest token's share"] == 0.5
    assert codebook_figures(torch.tensor([5, 5]))["codebook perplexity"] == pytest.approx(2)


# --- dalle-ds reconstruct ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dvae_run(tmp_path_factory):
    return write_dvae_run(tmp_path_factory.mktemp("runs") / "dvae", make_dvae())


def save_picture(path, seed, size=(70, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)
    return path


def test_pictures_from_files_folders_and_shards_stand_beside_their_rebuildings(tmp_path, dvae_run, capsys):
    places = [save_picture(tmp_path / "pictures" / name, i) for i, name in enumerate(["b.png", "deep/a.jpg"])]
    single = save_picture(tmp_path / "cat.one.webp", 5)
    with ShardWriter(tmp_path / "shards", samples_per_shard=10) as writer:
        writer.write({"png": places[0].read_bytes()})  # without a caption
    out = tmp_path / "out"
    named = [tmp_path / "pictures", single, tmp_path / "shards"]
    run_here("reconstruct", "--dvae", dvae_run, "--out", out, "--batch_size", 2, *named)
    files = ["0000-b.png", "0001-a.png", "0002-cat.one.png", "0003-000000000.png"]
    assert sorted(path.name for path in out.iterdir()) == [*files, "grid.png"]
    pixels = np.asarray(Image.open(out / files[0]))
    assert pixels.shape == (32, 2 * 32 + 4, 3)
    dvae, image = make_dvae(), torch.from_numpy(pixels[:, :32].copy()).permute(2, 0, 1)[None]
    assert (pixels[:, 36:] == dvae.decode(dvae.encode(image))[0].permute(1, 2, 0).numpy()).all()
    said = capsys.readouterr().out
    assert all(file in said for file in files)
    assert "mean of 4" in said
    value = psnr(image, dvae.decode(dvae.encode(image)))
    assert f"{float(value[0]):.2f}" in said


def test_what_is_no_picture_is_named_in_a_line_and_the_rest_goes_on(tmp_path, dvae_run, capsys):
    good = save_picture(tmp_path / "good.png", 0)
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    bad = [tmp_path / name for name in ("words.png", "nowhere.jpg", "empty", "broken.tar", "none-*.tar")]
    run_here("reconstruct", "--dvae", dvae_run, "--out", tmp_path / "out", *bad, good)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: left out ")]
    assert len(lines) == len(bad)
    for line, path, reason in zip(
        lines, bad, ["does not decode", "no such file", "neither .tar shards nor", "", "no shards match"], strict=True
    ):
        assert str(path) in line
        assert reason in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000-good.png", "grid.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}/nowhere.png"], "not one of 1 can be rebuilt; name picture files"),
        (["{tmp}/good.png", "--out", "{tmp}/good.png"], "good.png is a file: name a folder"),
        (["{tmp}/good.png", "--dvae", "{tmp}"], "is no run folder"),
        (["{tmp}/good.png", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, dvae_run, capsys, arguments, said):
    save_picture(tmp_path / "good.png", 0)
    words = ["reconstruct", "--dvae", str(dvae_run), "--out", str(tmp_path / "out")]
    assert main([*words, *(word.format(tmp=tmp_path) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dalle-ds reconstruct: error: ")
    assert error.count("\n") == 1
    assert said in error
    assert [path.name for path in tmp_path.iterdir()] == ["good.png"]
