# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""The AdamW update with 16-bit moments as one Triton kernel: decode, update, encode, write the weights.

What formats.py and adam.py do, in the same order and with products and sums apart, so that the results are theirs bit
for bit; only torch's square root on a CPU may be off by one unit in the last place. A format is a constexpr tuple: sign
bits, exponent bits, significand bits, bias, limit code, code of NaN.

Names: p_ pointers, o_ offsets, b_ values, m_ masks, i_ program ids.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels.compression.adam import Update
from dalle_kernels.compression.formats import (
    ADAM_MEAN,
    ADAM_VARIANCE,
    FORMATS,
    MURMUR,
    WEYL,
    Format,
    counter_start,
    signed,
)

BLOCK = 1024
# A product and a sum in one instruction would round once where the CPU rounds twice.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
NEAREST, STOCHASTIC, KAHAN = (tl.constexpr(i) for i in range(3))
ROUNDINGS = {"nearest": NEAREST.value, "stochastic": STOCHASTIC.value, "kahan": KAHAN.value}
INFINITY = tl.constexpr(0x7F800000)
STRIDE = tl.constexpr(WEYL)
FACTOR_1, FACTOR_2 = (tl.constexpr(factor) for _, factor in MURMUR[:2])
SHIFT_1, SHIFT_2, SHIFT_3 = (tl.constexpr(shift) for shift, _ in MURMUR)


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
        "WEIGHT": _numbers(FORMATS[weights.dtype]) if in_16_bit else None,
        "MEAN": _numbers(ADAM_MEAN) if means.dtype == torch.uint16 else None,
        "VARIANCE": _numbers(ADAM_VARIANCE) if variances.dtype == torch.uint16 else None,
        "ROUNDING": ROUNDINGS[update.rounding],
        "BLOCK": BLOCK,
    }
    return [*codes, len(weights), start, *numbers], constants


def _numbers(format: Format) -> tuple[int, ...]:
    bits = format.sign_bits, format.exponent_bits, format.significand_bits
    return *bits, format.bias, format.limit_code, format.nan_code


@triton.jit
def decode(b_code, FORMAT: tl.constexpr):
    """Codes (int32, the upper half arbitrary) -> float32."""
    SIGN: tl.constexpr = FORMAT[0]
    N_EXPONENT: tl.constexpr = FORMAT[1]
    N_SIGNIFICAND: tl.constexpr = FORMAT[2]
    BIAS: tl.constexpr = FORMAT[3]
    N_MAGNITUDE: tl.constexpr = N_EXPONENT + N_SIGNIFICAND
    FIRST_SPECIAL: tl.constexpr = ((1 << N_EXPONENT) - 1) << N_SIGNIFICAND
    b_magnitude = b_code & ((1 << N_MAGNITUDE) - 1)
    b_line = b_magnitude << (23 - N_SIGNIFICAND)
    # In two steps, for one power of two may be more than float32 has.
    b_value = b_line.to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))
    b_special = (b_line & 0x7FFFFF) | INFINITY
    b_value = tl.where(b_magnitude >= FIRST_SPECIAL, b_special.to(tl.float32, bitcast=True), b_value)
    if SIGN:  # as a bit, for the negative of 0 is 0 to Triton
        b_sign = (b_code >> N_MAGNITUDE) << 31
        b_value = (b_value.to(tl.int32, bitcast=True) | b_sign).to(tl.float32, bitcast=True)
    return b_value


@triton.jit
def encode(b_value, b_random, FORMAT: tl.constexpr, IS_STOCHASTIC: tl.constexpr):
    """float32 -> codes (int32), to nearest even or by random bits."""
    SIGN: tl.constexpr = FORMAT[0]
    N_EXPONENT: tl.constexpr = FORMAT[1]
    N_SIGNIFICAND: tl.constexpr = FORMAT[2]
    BIAS: tl.constexpr = FORMAT[3]
    LIMIT: tl.constexpr = FORMAT[4]
    NAN: tl.constexpr = FORMAT[5]
    SHIFT: tl.constexpr = 23 - N_SIGNIFICAND
    OFFSET: tl.constexpr = (127 - BIAS) << 23
    # A sum with this constant has float32's spacing of the constant: where it has no room for what is below the
    # smallest code it rounds to nearest even, and random bits need all of the room below.
    EXTRA: tl.constexpr = 0 if IS_STOCHASTIC else SHIFT
    CONSTANT: tl.constexpr = 2.0 ** (1 - BIAS + EXTRA)
    b_bits = b_value.to(tl.int32, bitcast=True)
    b_magnitude = b_bits & 0x7FFFFFFF
    b_low = tl.minimum(b_magnitude, OFFSET + (1 << 23)).to(tl.float32, bitcast=True)
    b_subnormal = (b_low + CONSTANT).to(tl.int32, bitcast=True) - (OFFSET + ((1 + EXTRA) << 23))
    if IS_STOCHASTIC:
        b_line = tl.maximum(b_magnitude - OFFSET, b_subnormal) + (b_random & ((1 << SHIFT) - 1))
        b_code = b_line >> SHIFT
    else:
        b_odd = (b_magnitude >> SHIFT) & 1
        b_normal = (b_magnitude + b_odd + ((1 << (SHIFT - 1)) - 1)) >> SHIFT
        b_code = tl.maximum(b_normal - (OFFSET >> SHIFT), b_subnormal)
    b_code = tl.minimum(b_code, LIMIT)
    if not SIGN:
        b_code = tl.where(b_bits < 0, 0, b_code)
    b_code = b_code | (((b_bits >> 31) & SIGN) << (N_EXPONENT + N_SIGNIFICAND))
    return tl.where(b_magnitude > INFINITY, NAN, b_code)


@triton.jit
def counter_bits(o_element, start):
    """Random bits (int32) of elements: formats.counter_bits."""
    b_bits = o_element.to(tl.uint32) * STRIDE + start.to(tl.uint32)
    b_bits = b_bits ^ (b_bits >> SHIFT_1)
    b_bits = b_bits * FACTOR_1
    b_bits = b_bits ^ (b_bits >> SHIFT_2)
    b_bits = b_bits * FACTOR_2
    b_bits = b_bits ^ (b_bits >> SHIFT_3)
    return b_bits.to(tl.int32, bitcast=True)


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
