"""The discrete VAE of stage 1: convolutional encoder and decoder around a grid of categorical cells.

Structure and parameter names follow Appendix A.1 and the authors' release, so that a state dict of one fits the other:
7x7 input convolution, four groups of bottleneck resblocks (widths n_hid * 1, 2, 4, 8), max-pooling down, nearest
upsampling up, and 1x1 convolutions in float32 where the relaxation enters and leaves.
"""

import itertools
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import DVAEConfig
from dalle_ds.models.likelihood import (
    gumbel_softmax,
    kl_to_uniform,
    logit_laplace_log_density,
    map_pixels,
    unmap_pixels,
)

N_GROUP = 4
WIDTHS = (1, 2, 4, 8)
CHANNELS = 3
# Of the squared distance against the fit of ln b, without relaxation.
SQUARES_WEIGHT = 5.0


class Conv2d(nn.Module):
    """A convolution with odd kernel and zero padding; weights N(0, 1 / fan_in), biases 0."""

    def __init__(self, n_in: int, n_out: int, kernel: int, *, full_precision: bool = False) -> None:
        super().__init__()
        self.padding = (kernel - 1) // 2
        self.full_precision = full_precision
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel) / math.sqrt(n_in * kernel**2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if self.full_precision else self.w.dtype
        # Pictures arrive channels-last, which is faster; weights are stored in rows, as DeepSpeed sends them.
        w = self.w.to(dtype, memory_format=torch.channels_last)
        return F.conv2d(x.to(dtype), w, self.b.to(dtype), padding=self.padding)


class ResBlock(nn.Module):
    """id_path(x) + post_gain * res_path(x), a bottleneck of four convolutions with `kernels`, each after a ReLU."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], post_gain: float) -> None:
        super().__init__()
        self.post_gain = post_gain
        widths = (n_in, n_out // 4, n_out // 4, n_out // 4, n_out)
        self.id_path = nn.Identity() if n_in == n_out else Conv2d(n_in, n_out, 1)
        self.res_path = nn.Sequential()
        for i, kernel in enumerate(kernels):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
            self.res_path.add_module(f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], kernel))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.post_gain)


def _group(widths: list[int], kernels: tuple[int, int, int, int], post_gain: float) -> "OrderedDict[str, nn.Module]":
    pairs = itertools.pairwise(widths)
    return OrderedDict((f"block_{i + 1}", ResBlock(*pair, kernels, post_gain)) for i, pair in enumerate(pairs))


def _post_gain(config: DVAEConfig) -> float:
    return config.post_gain or 1 / (N_GROUP * config.n_blk_per_group) ** 2


class Encoder(nn.Module):
    """Mapped pixels [B, 3, S, S] -> logits [B, vocab_size, S/8, S/8]."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        widths = [config.n_hid * m for m in WIDTHS]
        self.blocks = nn.Sequential(OrderedDict([("input", Conv2d(CHANNELS, config.n_hid, 7))]))
        n_in = config.n_hid
        for i, width in enumerate(widths):
            group = _group([n_in] + [width] * config.n_blk_per_group, (3, 3, 3, 1), _post_gain(config))
            if i < N_GROUP - 1:
                group["pool"] = nn.MaxPool2d(2)
            self.blocks.add_module(f"group_{i + 1}", nn.Sequential(group))
            n_in = width
        output = OrderedDict([("relu", nn.ReLU()), ("conv", Conv2d(n_in, config.vocab_size, 1, full_precision=True))])
        self.blocks.add_module("output", nn.Sequential(output))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Token weights [B, vocab_size, g, g] -> [B, 6, 8g, 8g]: mu of the three colours, then ln b of the three."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        widths = [config.n_hid * m for m in reversed(WIDTHS)]
        codebook = Conv2d(config.vocab_size, config.n_init, 1, full_precision=True)
        self.blocks = nn.Sequential(OrderedDict([("input", codebook)]))
        n_in = config.n_init
        for i, width in enumerate(widths):
            group = _group([n_in] + [width] * config.n_blk_per_group, (1, 3, 3, 3), _post_gain(config))
            if i < N_GROUP - 1:
                group["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
            self.blocks.add_module(f"group_{i + 1}", nn.Sequential(group))
            n_in = width
        output = OrderedDict([("relu", nn.ReLU()), ("conv", Conv2d(n_in, 2 * CHANNELS, 1))])
        self.blocks.add_module("output", nn.Sequential(output))

    def forward(self, x: Tensor) -> Tensor:
        # The stream below runs in the precision of the other weights.
        x = self.blocks.input(x).to(self.blocks.output.conv.w.dtype)  # type: ignore[union-attr, operator]
        return self.blocks[1:](x)  # type: ignore[no-any-return]


class DVAE(nn.Module):
    """Encoder, relaxation and decoder; `forward` is the training loss."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(
        self,
        images: Tensor,
        temperature: float | None,
        kl_weight: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The negative evidence lower bound of uint8 images [B, 3, S, S], a number a colour value (section 2.1).

        loss = reconstruction + kl_weight * kl, with both terms divided by the number of colour values in a picture and
        averaged over the batch. Also returns `codes` [B, g, g], the likeliest tokens. Without a temperature nothing is
        relaxed: the logits themselves go to the decoder, and mu is fitted by squares (see codebook.py).
        """
        x = map_pixels(images)
        logits = self.logits(x)  # [B, K, g, g]
        relaxed = logits if temperature is None else gumbel_softmax(logits, temperature, generator)
        mu, log_b = self.decoder(relaxed).float().chunk(2, dim=1)
        if self.config.min_scale:
            log_b = log_b.clamp(min=math.log(self.config.min_scale))
        values_per_image = images[0].numel()
        reconstruction = -logit_laplace_log_density(x, mu, log_b).mean()
        kl = kl_to_uniform(logits).flatten(1).sum(1).mean() / values_per_image
        loss = reconstruction + kl_weight * kl
        if temperature is None:
            # Under the density a pixel that is not yet explained gets a wide b, and through it hardly a gradient.
            squares = (torch.logit(x) - mu).square().mean()
            loss = SQUARES_WEIGHT * squares - logit_laplace_log_density(x, mu.detach(), log_b).mean()
        return {
            "loss": loss,
            "reconstruction": reconstruction,
            "kl": kl,
            "codes": logits.argmax(dim=1),
        }

    def logits(self, mapped: Tensor) -> Tensor:
        """Mapped pixels [B, 3, S, S] -> float32 logits [B, K, g, g]."""
        return self.encoder(mapped).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] -> the likeliest tokens, int64 [B, g, g]."""
        return self.logits(map_pixels(images)).argmax(dim=1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Tokens [B, g, g] -> uint8 images [B, 3, S, S]; ln b is not used for looking (Appendix A.3)."""
        one_hot = F.one_hot(codes.long(), self.config.vocab_size).permute(0, 3, 1, 2).float()
        mu = self.decoder(one_hot)[:, :CHANNELS]
        return unmap_pixels(torch.sigmoid(mu.float()))
