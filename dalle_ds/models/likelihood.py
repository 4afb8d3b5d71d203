"""Stage 1's likelihood and relaxation: logit-Laplace pixels, KL to the uniform prior, Gumbel-softmax.

Paper: section 2.1 and Appendix A.3 (equations 2 and 3).
"""

import math

import torch
from torch import Tensor

# Equation 3: bytes are mapped into (eps, 1 - eps), away from the ends where the logit is infinite.
PIXEL_EPS = 0.1
UINT8_MAX = 255.0
# Below the smallest positive number of a float32 generator (2^-24), so that only an exact 0 is moved.
SMALLEST_UNIFORM = 2.0**-30


def map_pixels(pixels: Tensor) -> Tensor:
    """Bytes 0..255 (any dtype) to float32 in [0.1, 0.9] (equation 3)."""
    return (1 - 2 * PIXEL_EPS) * (pixels.float() / UINT8_MAX) + PIXEL_EPS


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of `map_pixels`, clamped: mapped values to uint8."""
    unit = ((mapped.float() - PIXEL_EPS) / (1 - 2 * PIXEL_EPS)).clamp(0, 1)
    return (unit * UINT8_MAX).round().to(torch.uint8)


def logit_laplace_log_density(x: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """ln f(x | mu, b) of the logit-Laplace density (equation 2), elementwise, computed in float32 or wider.

    x in (0, 1); mu is the median of logit(x), log_b the log of the Laplace scale. Nats.
    """
    x, mu, log_b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, mu, log_b))
    jacobian = torch.log(x) + torch.log1p(-x)
    return -(torch.logit(x) - mu).abs() * torch.exp(-log_b) - math.log(2) - log_b - jacobian


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in nats for each cell, from un-noised logits [B, K, *grid] -> [B, *grid]."""
    log_q = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    return math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(dim=1)


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """A relaxed one-hot sample softmax((logits + Gumbel noise) / temperature) over dim 1, soft in both directions.

    logits [B, K, *grid] -> weights of the same shape in float32.
    """
    uniform = torch.empty_like(logits, dtype=torch.float32).uniform_(generator=generator).clamp_(min=SMALLEST_UNIFORM)
    gumbel = -(-uniform.log()).log()
    return torch.softmax((logits.float() + gumbel) / temperature, dim=1)
