"""Stage 1's likelihood and relaxation: logit-Laplace pixels, KL to the uniform prior, Gumbel-softmax.

Paper: section 2.1 and Appendix A.3 (equations 2 and 3).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Equation 3: bytes are mapped into (eps, 1 - eps), away from the ends where the logit is infinite.
PIXEL_EPS = 0.1
UINT8_MAX = 255.0
# Below the smallest positive number of a float32 generator (2^-24), so that only an exact 0 is moved.
SMALLEST_UNIFORM = 2.0**-30
# Below it, 1 / b times the largest half (65,504) and the sum over a batch would leave float32.
SMALLEST_LOG_B = -60.0


def map_pixels(pixels: Tensor) -> Tensor:
    """Bytes 0..255 (any dtype) to float32 in [0.1, 0.9] (equation 3)."""
    return (1 - 2 * PIXEL_EPS) * (pixels.float() / UINT8_MAX) + PIXEL_EPS


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of `map_pixels`, clamped: mapped values to uint8."""
    unit = ((mapped.float() - PIXEL_EPS) / (1 - 2 * PIXEL_EPS)).clamp(0, 1)
    return (unit * UINT8_MAX).round().to(torch.uint8)


def logit_laplace_log_density(x: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """ln f(x | mu, b) of the logit-Laplace density (equation 2), elementwise, computed in float32 or wider.

    x in (0, 1); mu is the median of logit(x), log_b the log of the Laplace scale. Nats. Value and gradients are finite
    for every mu and log_b that a half can hold.
    """
    x, mu, log_b = (_widen(t) for t in (x, mu, log_b))
    # 1 / b stops growing at the floor, but its gradient does not vanish there: it still asks for a larger b.
    floored = log_b + (log_b.clamp(min=SMALLEST_LOG_B) - log_b).detach()
    jacobian = torch.log(x) + torch.log1p(-x)
    return -(torch.logit(x) - mu).abs() * torch.exp(-floored) - math.log(2) - floored - jacobian


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in nats for each cell, from un-noised logits [B, K, *grid] -> [B, *grid]."""
    log_q = torch.log_softmax(_widen(logits), dim=1)
    return math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(dim=1)


def gumbel_softmax(
    logits: Tensor, temperature: float, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> Tensor:
    """A relaxed one-hot sample softmax((logits + Gumbel noise) / temperature) over dim 1, soft in both directions.

    logits [B, K, *grid] -> weights of the same shape in float32 or wider. `generator` is one for the batch, or B.
    """
    noise = gumbel_noise(logits, generator)
    return torch.softmax(torch.add(noise.div_(temperature), _widen(logits), alpha=1 / temperature), dim=1)


def gumbel_noise(logits: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """Standard Gumbel noise in float32, of the shape and layout of logits [B, ...]; see `gumbel_softmax`."""
    uniform = torch.empty_like(logits, dtype=torch.float32, requires_grad=False)
    if isinstance(generator, Sequence):
        for sample, own in zip(uniform, generator, strict=True):
            sample.uniform_(generator=own)
    else:
        uniform.uniform_(generator=generator)
    # In place: at full size this is 32 MiB a picture.
    return uniform.clamp_(min=SMALLEST_UNIFORM).log_().neg_().log_().neg_()


def _widen(t: Tensor) -> Tensor:
    """The tensor in float32, or in its own precision where that is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
