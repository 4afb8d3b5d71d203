"""The discrete VAE of stage 1: convolutional encoder and decoder around a grid of categorical cells.

Structure and parameter names follow Appendix A.1 and the authors' release, so that a state dict of one fits the other:
7x7 input convolution, four groups of bottleneck resblocks (widths n_hid * 1, 2, 4, 8), max-pooling down, nearest
upsampling up, and 1x1 convolutions in float32 where the relaxation enters and leaves. In float32 on a CPU, encoder and
decoder give the bits that the release gives for the same input, in either memory layout.
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
# Of the blocks (input, group_1 .. group_4, output), those before the memory layout may change: the first two groups.
N_SHALLOW = 3
# Max pooling reached the better evidence lower bound in the paper's comparison (section 2.1).
POOLS: dict[str, type[nn.Module]] = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}
# Of the squared distance against the fit of ln b, without relaxation.
SQUARES_WEIGHT = 5.0


class Conv2d(nn.Module):
    """A convolution with odd kernel, zero padding and its input's layout; weights N(0, 1 / fan_in), biases 0."""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__()
        self.padding = (kernel - 1) // 2
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel) / math.sqrt(n_in * kernel**2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """gain * (w * x + b)."""
        w, b = self._scaled(gain)
        return F.conv2d(x, w, b, padding=self.padding)

    def _scaled(self, gain: float) -> tuple[Tensor, Tensor]:
        return (self.w, self.b) if gain == 1 else (gain * self.w, gain * self.b)


class Float32Conv2d(Conv2d):
    """A convolution in float32, whatever the precision around it or of its weights.

    On a GPU that has TF32, `torch.backends.cudnn.allow_tf32` decides whether its products are rounded to that.
    """

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        device = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
        with torch.autocast(device, enabled=False):
            w, b = self._scaled(gain)
            return F.conv2d(x.float(), w.float(), b.float(), padding=self.padding)


class ResBlock(nn.Module):
    """id_path(x) + post_gain * res_path(x), a bottleneck of four convolutions with `kernels`, each after a ReLU."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], post_gain: float) -> None:
        super().__init__()
        self.post_gain = post_gain
        self.checkpoint_activations = False
        widths = (n_in, n_out // 4, n_out // 4, n_out // 4, n_out)
        self.id_path = nn.Identity() if n_in == n_out else Conv2d(n_in, n_out, 1)
        self.res_path = nn.Sequential()
        for i, kernel in enumerate(kernels):
            # What the first ReLU takes is wanted again by id_path; what a convolution gives is wanted by nobody else.
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU(inplace=i > 0))
            self.res_path.add_module(f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], kernel))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        hidden, last = self.res_path[:-1](x), cast(Conv2d, self.res_path.conv_4)
        if math.frexp(self.post_gain)[0] == 0.5:
            # A power of two rounds nothing: in the weights it gives the same bits, and costs no pass over activations.
            residual: Tensor = last(hidden, self.post_gain)
        else:
            residual = last(hidden).mul_(self.post_gain)
        return residual.add_(self.id_path(x))


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
                group["pool"] = POOLS[config.pool](2)
            self.blocks.add_module(f"group_{i + 1}", nn.Sequential(group))
            n_in = width
        output = OrderedDict([("relu", nn.ReLU(inplace=True)), ("conv", Float32Conv2d(n_in, config.vocab_size, 1))])
        self.blocks.add_module("output", nn.Sequential(output))

    def forward(self, x: Tensor, deep_layout: torch.memory_format = torch.preserve_format) -> Tensor:
        """`deep_layout`: the memory layout from group_3 on, where the picture is small and the channels are many."""
        x = self.blocks[:N_SHALLOW](x.to(self.blocks.input.w.dtype))  # type: ignore[union-attr, arg-type]
        return self.blocks[N_SHALLOW:](x.to(memory_format=deep_layout))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Token weights [B, vocab_size, g, g] -> [B, 6, 8g, 8g]: mu of the three colours, then ln b of the three."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        widths = [config.n_hid * m for m in reversed(WIDTHS)]
        codebook = Float32Conv2d(config.vocab_size, config.n_init, 1)
        self.blocks = nn.Sequential(OrderedDict([("input", codebook)]))
        n_in = config.n_init
        for i, width in enumerate(widths):
            group = _group([n_in] + [width] * config.n_blk_per_group, (1, 3, 3, 3), _post_gain(config))
            if i < N_GROUP - 1:
                group["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
            self.blocks.add_module(f"group_{i + 1}", nn.Sequential(group))
            n_in = width
        output = OrderedDict([("relu", nn.ReLU(inplace=True)), ("conv", Conv2d(n_in, 2 * CHANNELS, 1))])
        self.blocks.add_module("output", nn.Sequential(output))

    def forward(self, x: Tensor, shallow_layout: torch.memory_format = torch.preserve_format) -> Tensor:
        """`shallow_layout`: the memory layout from group_3 on, where the picture is large and the channels are few."""
        # The stream below runs in the precision of the other weights.
        x = self.blocks.input(x).to(self.blocks.output.conv.w.dtype)  # type: ignore[union-attr, operator]
        x = self.blocks[1:N_SHALLOW](x)
        return self.blocks[N_SHALLOW:](x.to(memory_format=shallow_layout))  # type: ignore[no-any-return]


class DVAE(nn.Module):
    """Encoder, relaxation and decoder; `forward` is the training loss."""

    def __init__(self, config: DVAEConfig, *, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.checkpoint_activations = checkpoint_activations

    def forward(
        self,
        images: Tensor,
        temperature: float | None,
        kl_weight: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> dict[str, Tensor]:
        """The negative evidence lower bound of uint8 images [B, 3, S, S], a number a colour value (section 2.1).

        loss = reconstruction + kl_weight * kl, with both terms divided by the number of colour values in a picture and
        averaged over the batch. Also returns `codes` [B, g, g], the likeliest tokens. Without a temperature nothing is
        relaxed: the logits themselves go to the decoder, and mu is fitted by squares (see codebook.py). `generator` is
        one for the batch, or one for each picture: then the noise does not depend on how a batch is cut.
        """
        # Channels last is the faster layout, but for the deep groups on a CPU.
        x = map_pixels(images).to(memory_format=torch.channels_last)
        deep_layout = torch.contiguous_format if x.device.type == "cpu" else torch.channels_last
        logits = self.encoder(x, deep_layout).float()  # [B, K, g, g]
        relaxed = logits if temperature is None else gumbel_softmax(logits, temperature, generator)
        mu, log_b = self.maps(relaxed, torch.channels_last)
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

    def maps(self, weights: Tensor, layout: torch.memory_format = torch.preserve_format) -> tuple[Tensor, Tensor]:
        """Token weights [B, K, g, g] -> mu and ln b, float32 [B, 3, S, S] each, with the floor under b."""
        mu, log_b = self.decoder(weights, layout).float().chunk(2, dim=1)
        return mu, log_b.clamp(min=math.log(self.config.min_scale)) if self.config.min_scale else log_b

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
