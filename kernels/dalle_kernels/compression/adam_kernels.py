# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""The AdamW update with 16-bit moments as one Triton kernel: decode, update, encode, write the weights.

What adam.py does, in the same order and with products and sums apart, so that the results are its own bit for bit; only
torch's square root on a CPU may be off by one unit in the last place. Names and formats are those of codec_kernels.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels.compression.adam import Update
from dalle_kernels.compression.codec_kernels import BLOCK, OPTIONS, counter_bits, decode, encode, numbers_of
from dalle_kernels.compression.formats import ADAM_MEAN, ADAM_VARIANCE, FORMATS, counter_start, signed

NEAREST, STOCHASTIC, KAHAN = (tl.constexpr(i) for i in range(3))
ROUNDINGS = {"nearest": NEAREST.value, "stochastic": STOCHASTIC.value, "kahan": KAHAN.value}


def update_on_gpu(
    weights: Tensor,
    gradients: Tensor,
    means: Tensor,
    variances: Tensor,
    compensation: Tensor | None,
    update: Update,
) -> None:
    """`update_on_cpu` as one kernel, with the same arguments."""
    n = len(weights)
    if n == 0:  # the shard of a rank beyond the last parameter
        return
    arguments, constants = launch_arguments(weights, gradients, means, variances, compensation, update)
    adam_kernel[(triton.cdiv(n, BLOCK),)](*arguments, **constants, **OPTIONS)


def launch_arguments(
    weights: Tensor,
    gradients: Tensor,
    means: Tensor,
    variances: Tensor,
    compensation: Tensor | None,
    update: Update,
) -> tuple[list[Any], dict[str, Any]]:
    """What the kernel takes, and its constants."""
    in_16_bit = weights.dtype != torch.float32
    tensors = [weights, gradients, means, variances, weights if compensation is None else compensation]
    # The kernel reads 16 bits that are no numbers of its own as int16.
    codes = [t if t.dtype == torch.float32 or t is gradients else t.view(torch.int16) for t in tensors]
    start = signed(counter_start(update.position, update.seed, update.step))
    numbers = [update.beta1, 1 - update.beta1, update.beta2, 1 - update.beta2]
    numbers += [update.rate, update.eps, update.decay, update.variance_limit]
    constants = {
        "WEIGHT": numbers_of(FORMATS[weights.dtype]) if in_16_bit else None,
        "MEAN": numbers_of(ADAM_MEAN) if means.dtype == torch.uint16 else None,
        "VARIANCE": numbers_of(ADAM_VARIANCE) if variances.dtype == torch.uint16 else None,
        "ROUNDING": ROUNDINGS[update.rounding],
        "BLOCK": BLOCK,
    }
    return [*codes, len(weights), start, *numbers], constants


@triton.jit
def _load(p, o_element, m_element, FORMAT: tl.constexpr):
    b = tl.load(p + o_element, mask=m_element, other=0)
    if FORMAT is None:
        return b.to(tl.float32)
    else:
        return decode(b.to(tl.int32), FORMAT)


@triton.jit
def _store(p, o_element, m_element, b_value, FORMAT: tl.constexpr):
    if FORMAT is None:
        tl.store(p + o_element, b_value, mask=m_element)
    else:
        tl.store(p + o_element, encode(b_value, 0, FORMAT, False).to(tl.int16), mask=m_element)


@triton.jit(do_not_specialize=["start"])
def adam_kernel(
    p_weight,
    p_gradient,
    p_mean,
    p_variance,
    p_rest,
    n,
    start,
    beta1,
    new1,
    beta2,
    new2,
    rate,
    eps,
    decay,
    variance_limit,
    WEIGHT: tl.constexpr,
    MEAN: tl.constexpr,
    VARIANCE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of the update; `new1` and `new2` are what the betas leave of 1. A format of None is float32."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_gradient = tl.load(p_gradient + o, mask=m, other=0.0).to(tl.float32)
    b_mean = _load(p_mean, o, m, MEAN) * beta1 + b_gradient * new1
    b_variance = _load(p_variance, o, m, VARIANCE) * beta2 + b_gradient * b_gradient * new2
    # NaN stays NaN: the comparison is false for it.
    b_variance = tl.where(b_variance > variance_limit, variance_limit, b_variance)
    _store(p_mean, o, m, b_mean, MEAN)
    _store(p_variance, o, m, b_variance, VARIANCE)
    b_weight = _load(p_weight, o, m, WEIGHT)
    b_change = tl.div_rn(b_mean, tl.sqrt_rn(b_variance) + eps) * rate + b_weight * decay
    if WEIGHT is None:
        tl.store(p_weight + o, b_weight - b_change, mask=m)
    elif ROUNDING == KAHAN:
        b_change = _load(p_rest, o, m, WEIGHT) - b_change
        b_code = encode(b_weight + b_change, 0, WEIGHT, False)
        tl.store(p_weight + o, b_code.to(tl.int16), mask=m)
        _store(p_rest, o, m, b_change - (decode(b_code, WEIGHT) - b_weight), WEIGHT)
    elif ROUNDING == STOCHASTIC:
        b_code = encode(b_weight - b_change, counter_bits(o, start), WEIGHT, True)
        tl.store(p_weight + o, b_code.to(tl.int16), mask=m)
    else:
        _store(p_weight, o, m, b_weight - b_change, WEIGHT)
