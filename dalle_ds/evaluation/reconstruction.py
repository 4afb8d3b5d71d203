"""How well a dVAE gives pictures back: likelihood bounds, PSNR, SSIM, LPIPS, and how it uses its codebook.

With q(z|x) the encoder's categorical cells, a uniform prior over K tokens in each of N cells, and f the logit-Laplace
density of a mapped colour value, three ways into the decoder are measured (section 2.1 of the paper):

- "relaxed": E ln f(x|w) - KL(q, uniform), w the Gumbel-softmax weights at a temperature. Training maximises this, there
  with a weight on the KL term and here with 1. It bounds nothing: w mixes tokens, which the discrete model never does,
  and the KL term is that of q and not of the law of w.
- "drawn": E ln f(x|z) - KL(q, uniform), z drawn from q: the evidence lower bound (ELBO) on ln p(x) of the discrete
  model. One draw a picture, from the noise that the relaxed weights take: it is their limit at temperature 0, and the
  difference is the gap which the paper closes by ending at temperature 1/16.
- "likeliest": ln f(x|argmax q) - N ln K: a lower bound on the same ln p(x), of the encoder that always takes the
  likeliest token, as encode-images does. Its posterior is a point, so its KL to the uniform is N ln K.

All terms are divided by the dimensions, the colour values of a picture. f is the density of a value mapped into (0, 1),
not a probability: it may exceed 1, and its ELBO 0. A probability of the byte itself is the mass of f up to the middles
between neighbouring bytes, and up to 0 and 1 at the ends: 256 numbers that add up to 1. The argument for the ELBO holds
for any p(x|z), so that mass in place of f bounds the code length of the bytes, in bits, as other models report it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dalle_ds.models.dvae import CHANNELS, DVAE
from dalle_ds.models.likelihood import (
    PIXEL_EPS,
    UINT8_MAX,
    gumbel_softmax,
    kl_to_uniform,
    logit_laplace_log_density,
    map_pixels,
    unmap_pixels,
)

DRAWN, LIKELIEST = "drawn", "likeliest"
BITS = 1 / math.log(2)  # in a nat
N_BYTE = 256
# Between the noise of two seeds; a picture's own seed is seed * SEED_STRIDE + its number.
SEED_STRIDE = 1_000_003


class Distance(Protocol):
    """A learned distance of pictures, uint8 [B, 3, S, S] each: [B]."""

    def __call__(self, first: Tensor, second: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Terms:
    """What one way into the decoder costs each picture: [B], nats a dimension, lower is better."""

    reconstruction: Tensor  # -ln f, the density of the mapped values
    byte_reconstruction: Tensor  # -ln P, the probability of the bytes
    kl: Tensor


@dataclass(frozen=True)
class Measured:
    """A batch through the dVAE: terms by decoder, the likeliest tokens [B, g, g], and their pictures."""

    terms: dict[str, Terms]
    codes: Tensor
    rebuilt: Tensor  # uint8 [B, 3, S, S]


def relaxed_name(temperature: float) -> str:
    """How the relaxed decoder at `temperature` is called."""
    return f"relaxed at {temperature:g}"


@torch.no_grad()
def measure(dvae: DVAE, images: Tensor, temperatures: Sequence[float], seeds: Sequence[int]) -> Measured:
    """The terms of uint8 `images` [B, 3, S, S] in every decoder; picture i takes its noise from seeds[i] alone."""
    x = map_pixels(images)
    # In rows, so that the noise of a cell does not depend on how the convolutions lay out a batch of this size.
    logits = dvae.logits(x).contiguous()  # [B, K, g, g]
    n_dim = images[0].numel()
    kl = kl_to_uniform(logits).flatten(1).sum(1) / n_dim
    terms = {}
    for temperature in temperatures:
        mu, log_b = dvae.maps(_add_noise(logits, temperature, seeds))
        terms[relaxed_name(temperature)] = _terms(images, mu, log_b, kl)
    # The largest of logits with Gumbel noise is a draw from the categorical.
    drawn = _add_noise(logits, 1.0, seeds).argmax(dim=1)
    terms[DRAWN] = _terms(images, *dvae.maps(_one_hot(drawn, logits)), kl)
    codes = logits.argmax(dim=1)
    mu, log_b = dvae.maps(_one_hot(codes, logits))
    point_kl = torch.full_like(kl, codes[0].numel() * math.log(logits.shape[1]) / n_dim)
    terms[LIKELIEST] = _terms(images, mu, log_b, point_kl)
    return Measured(terms, codes, unmap_pixels(torch.sigmoid(mu)))


def _add_noise(logits: Tensor, temperature: float, seeds: Sequence[int]) -> Tensor:
    """Gumbel-softmax weights [B, K, g, g]; each picture's noise is the same at every temperature."""
    generators = [torch.Generator(logits.device).manual_seed(seed) for seed in seeds]
    noisy = [gumbel_softmax(logits[i : i + 1], temperature, generator) for i, generator in enumerate(generators)]
    return torch.cat(noisy)


def _one_hot(codes: Tensor, logits: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter_(1, codes[:, None], 1.0)


def _terms(images: Tensor, mu: Tensor, log_b: Tensor, kl: Tensor) -> Terms:
    density = logit_laplace_log_density(map_pixels(images), mu, log_b)
    bytes_ = byte_log_probability(images, mu, log_b)
    return Terms(reconstruction=-density.flatten(1).mean(1), byte_reconstruction=-bytes_.flatten(1).mean(1), kl=kl)


def byte_log_probability(pixels: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """ln P(byte), elementwise: the mass of the logit-Laplace density in the byte's share of (0, 1). Nats, float64.

    A byte's share ends halfway to its neighbours; those of 0 and 255 reach to 0 and 1.
    """
    middles = (torch.arange(N_BYTE + 1, dtype=torch.float64, device=pixels.device) - 0.5) / UINT8_MAX
    edges = torch.logit((1 - 2 * PIXEL_EPS) * middles + PIXEL_EPS)
    edges[0], edges[-1] = -math.inf, math.inf
    scale = log_b.double().exp()
    low, high = ((edges[pixels.long() + side] - mu.double()) / scale for side in (0, 1))
    # Of the Laplace distribution function between two points: around its centre, or on one side of it.
    around = torch.log(-(torch.expm1(low) + torch.expm1(-high)) / 2)
    beside = -math.log(2) - torch.minimum(low.abs(), high.abs()) + torch.log(-torch.expm1(low - high))
    return torch.where((low < 0) & (high > 0), around, beside)


def squared_error(pictures: Tensor, rebuilt: Tensor) -> Tensor:
    """Mean squared difference of each pair of uint8 pictures [B, 3, S, S] -> [B], in squared steps of 1 / 255."""
    return (pictures.double() - rebuilt.double()).square().flatten(1).mean(1)


def psnr(pictures: Tensor, rebuilt: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of uint8 pictures [B, 3, S, S] -> [B], in dB.

    That of equal pictures is infinite and would swallow every mean: they count as one value being one step off.
    """
    error = squared_error(pictures, rebuilt)
    return error_to_psnr(error.clamp(min=1 / pictures[0].numel()))


def error_to_psnr(error: Tensor) -> Tensor:
    """A mean squared error of values 0..255 in dB below their range."""
    return 10 * torch.log10(UINT8_MAX**2 / error)


def ssim(pictures: Tensor, rebuilt: Tensor) -> Tensor:
    """Structural similarity of each pair of uint8 pictures [B, 3, S, S] -> [B] (Wang et al. 2004).

    Gaussian windows of 11 x 11 with deviation 1.5, reflected at the border, over a data range of 1; mean over colours.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = (stack.float().contiguous() / UINT8_MAX for stack in (pictures, rebuilt))
    similarity = structural_similarity_index_measure(
        second, first, gaussian_kernel=True, sigma=1.5, data_range=1.0, reduction="none"
    )
    assert isinstance(similarity, Tensor)
    return similarity.reshape(len(pictures)).double()


def codebook_figures(counts: Tensor) -> dict[str, float]:
    """Of how often each token was used, [K]: the fraction of tokens in use, their perplexity, the commonest's share."""
    share = counts.double() / counts.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return {
        "codebook use": float((counts > 0).double().mean()),
        "codebook perplexity": float(entropy.exp()),
        "commonest token's share": float(share.max()),
    }


class Meter:
    """Gathers what `measure` says of batch after batch. The figures do not depend on how pictures are batched.

    `psnr` holds that of every picture so far, in order.
    """

    def __init__(
        self, dvae: DVAE, temperatures: Sequence[float], *, seed: int = 0, distance: Distance | None = None
    ) -> None:
        self.dvae, self.seed, self.distance = dvae, seed, distance
        # Twice the same temperature is one decoder.
        self.temperatures = list({relaxed_name(temperature): temperature for temperature in temperatures}.values())
        self.psnr: list[float] = []
        self._sums: dict[str, float] = {}
        self._counts = torch.zeros(dvae.config.vocab_size, dtype=torch.int64)

    @property
    def n(self) -> int:
        """Pictures so far."""
        return len(self.psnr)

    def add(self, images: Tensor) -> None:
        """Measures uint8 images [B, 3, S, S] on the device of the dVAE."""
        first = self.seed * SEED_STRIDE + self.n
        measured = measure(self.dvae, images, self.temperatures, range(first, first + len(images)))
        for name, terms in measured.terms.items():
            for term, values in vars(terms).items():
                self._add_sum(f"{name}: {term}", values)
        self._counts += torch.bincount(measured.codes.flatten(), minlength=len(self._counts)).cpu()
        self._add_sum("SSIM", ssim(images, measured.rebuilt))
        self._add_sum("squared error", squared_error(images, measured.rebuilt))
        if self.distance is not None:
            self._add_sum("LPIPS", self.distance(images, measured.rebuilt))
        self.psnr += psnr(images, measured.rebuilt).tolist()

    def _add_sum(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(values.double().sum())

    def _mean(self, name: str) -> float:
        return self._sums[name] / self.n

    def bounds(self) -> list[dict[str, Any]]:
        """A row for each decoder: its terms in nats and bits a dimension, and the KL in nats a cell.

        `elbo` is -(reconstruction + KL), higher is better; `bytes` is the code length of the bytes, lower is better.
        """
        config = self.dvae.config
        dims_per_cell = CHANNELS * (config.image_size // config.grid_size) ** 2
        rows = []
        for name in [*map(relaxed_name, self.temperatures), DRAWN, LIKELIEST]:
            reconstruction, byte_reconstruction, kl = (
                self._mean(f"{name}: {term}") for term in ("reconstruction", "byte_reconstruction", "kl")
            )
            nats = {"reconstruction": reconstruction, "kl": kl, "elbo": -(reconstruction + kl)}
            nats["bytes"] = byte_reconstruction + kl
            row: dict[str, Any] = {"decoder": name, "is_bound": name in (DRAWN, LIKELIEST)}
            for term, value in nats.items():
                row |= {f"{term}_nats": value, f"{term}_bits": value * BITS}
            rows.append({**row, "kl_nats_per_cell": kl * dims_per_cell})
        return rows

    def figures(self) -> list[dict[str, Any]]:
        """(name, value, n) of every figure, the telling ones first."""
        values = {"PSNR (dB)": sum(self.psnr) / self.n, "SSIM": self._mean("SSIM")}
        if self.distance is not None:
            values["LPIPS (AlexNet)"] = self._mean("LPIPS")
        values |= codebook_figures(self._counts)
        least = 1 / (self.n * CHANNELS * self.dvae.config.image_size**2)
        error = torch.tensor(self._mean("squared error"), dtype=torch.float64).clamp(min=least)
        values["PSNR of the mean squared error (dB)"] = float(error_to_psnr(error))
        elbos = {row["decoder"]: row["elbo_bits"] for row in self.bounds()}
        values |= {f"ELBO, {name} (bits a dimension)": elbo for name, elbo in elbos.items()}
        for temperature in self.temperatures:
            relaxed = relaxed_name(temperature)
            for name in (DRAWN, LIKELIEST):
                values[f"ELBO gap, {relaxed} minus {name} (bits a dimension)"] = elbos[relaxed] - elbos[name]
        return [{"name": name, "value": value, "n": self.n} for name, value in values.items()]
