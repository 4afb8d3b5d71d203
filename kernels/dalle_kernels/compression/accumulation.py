"""Adds gradients into sums that are kept as codes of 16 bits: done for every entry in every micro-step.

On a CPU a chunk at a time, so that what is worked on stays in the cache; on a GPU in one kernel (codec_kernels.py),
with the same results bit for bit.
"""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_kernels.compression.formats import CHUNK, Format, counter_bits, decode, encode


@dataclass(frozen=True)
class Noise:
    """What the random bits of stochastic rounding are a function of, beside an entry's place (`counter_bits`)."""

    seed: int
    step: int


def noise_of(name: str, n_updates: int, n_added: int) -> Noise | None:
    """How the gradient of parameter `name` is rounded to which `n_added` were added in this update, after `n_updates`.

    The first to nearest (None). But the sum of many micro-steps would lose what is small against it, always the same
    way; rounded stochastically, it loses nothing on average.
    """
    return Noise(zlib.crc32(name.encode()) | n_added << 32, n_updates) if n_added else None


def accumulate(
    codes: Tensor, gradient: Tensor, factor: Tensor, finite: Tensor, format: Format, unit: float, noise: Noise | None
) -> None:
    """codes = encode(unit * (decode(codes) / unit + factor * gradient)) in place, in float32.

    `codes` (uint16, contiguous) and `gradient` (any floating dtype) have one shape; `factor` is a float32 scalar, and
    where the bool scalar `finite` is false nothing is added. Rounds to nearest even, or stochastically with `noise`.
    """
    flat, new = codes.view(-1), gradient.reshape(-1)
    if codes.is_cuda:
        from dalle_kernels.compression.codec_kernels import accumulate_on_gpu

        return accumulate_on_gpu(flat, new, factor, finite, format, unit, noise)
    if not finite:
        return None
    scratch = torch.empty(4, min(CHUNK, len(flat)))
    for start in range(0, len(flat), CHUNK):
        part = slice(start, start + CHUNK)
        sums, one, two, three = scratch[:, : len(flat[part])]
        decode(flat[part], format, out=sums, scale=1 / unit)
        sums.add_(one.copy_(new[part]).mul_(factor)).mul_(unit)
        bits = None
        if noise is not None:
            bits = counter_bits(start, noise.seed, noise.step, one.view(torch.int32), two.view(torch.int32))
        encode(sums, format, random=bits, out=flat[part], scratch=(two, three))
    return None
