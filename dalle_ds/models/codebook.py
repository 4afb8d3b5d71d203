"""A codebook by k-means: how a short training gets past the start at which all cells choose one token.

The paper anneals a relaxation over millions of steps. In minutes the relaxed model settles on a handful of tokens. So a
dVAE may first train without relaxation, its logits going straight to the decoder; k-means then places one token at each
of K centres of what the decoder is given, and the relaxed training goes on from there with all tokens in use.
"""

import math
from typing import cast

import torch
from torch import Tensor

from dalle_ds.models.dvae import DVAE, Conv2d
from dalle_ds.models.likelihood import map_pixels

# Cells that the centres are fitted to, and rounds of k-means after the k-means++ start.
N_CELLS, N_ROUNDS = 8_000, 5
# KL of a cell's posterior against the uniform that the logits are scaled to, as a fraction of its largest value ln K:
# sharp, for the noise of a soft posterior blurs what the decoder has learned.
START_KL = 0.9


@torch.no_grad()
def make_codebook(dvae: DVAE, images: Tensor, seed: int = 0) -> None:
    """Turns a dVAE trained without relaxation into one whose tokens are the k-means centres of its cells, in place.

    images: uint8 [B, 3, S, S]. With h the features before the encoder's last convolution and z(h), affine in h, what
    the decoder's trunk receives: token k gets the codebook vector c_k, and the logits are those of the nearest centre,
    s (z . c_k - |c_k|^2 / 2), with s such that the mean KL to the uniform is START_KL ln K.
    """
    to_logits = cast(Conv2d, dvae.encoder.blocks.output.conv)  # type: ignore[union-attr]
    to_trunk = cast(Conv2d, dvae.decoder.blocks.input)
    features = dvae.encoder.blocks[:-1](map_pixels(images)).relu()
    h = features.permute(0, 2, 3, 1).flatten(0, 2)  # [N, F]
    a, b = to_logits.w[:, :, 0, 0], to_trunk.w[:, :, 0, 0]
    slope = b @ a  # [n_init, F]
    offset = b @ to_logits.b + to_trunk.b
    z = h @ slope.T + offset
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(z), generator=generator)[:N_CELLS]
    centres = k_means(z[chosen], dvae.config.vocab_size, generator)  # [K, n_init]
    weight = centres @ slope
    bias = centres @ offset - centres.square().sum(1) / 2
    scale = _scale_for_kl(h[chosen] @ weight.T + bias, START_KL * math.log(len(centres)))
    to_logits.w.copy_(scale * weight[:, :, None, None])
    to_logits.b.copy_(scale * bias)
    to_trunk.w.copy_(centres.T[:, :, None, None])
    to_trunk.b.zero_()


def k_means(points: Tensor, n_centres: int, generator: torch.Generator) -> Tensor:
    """Centres [n_centres, D] of points [N, D]: k-means++ seeding, then N_ROUNDS of Lloyd's algorithm."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    distance = (points - centres).square().sum(1)
    for _ in range(n_centres - 1):
        # A floor lets points repeat when there are fewer distinct ones than centres.
        pick = torch.multinomial(distance.clamp(min=1e-12), 1, generator=generator)
        centres = torch.cat([centres, points[pick]])
        distance = torch.minimum(distance, (points - points[pick]).square().sum(1))
    for _ in range(N_ROUNDS):
        nearest = torch.cdist(points, centres).argmin(1)
        counts = torch.bincount(nearest, minlength=n_centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres


def _scale_for_kl(logits: Tensor, target: float) -> float:
    """The factor at which the mean KL of softmax(factor * logits [N, K]) to the uniform is `target`, by bisection."""

    def kl(factor: float) -> float:
        log_q = torch.log_softmax(factor * logits, dim=1)
        return math.log(logits.shape[1]) + float((log_q.exp() * log_q).sum(1).mean())

    low, high = -20.0, 20.0  # of ln factor
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(math.exp(middle)) < target else (low, middle)
    return math.exp(low)
