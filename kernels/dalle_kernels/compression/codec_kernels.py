# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""The codec of formats.py and the sums of accumulation.py in Triton, for GPUs.

What these do, with the same results bit for bit. A format is a constexpr tuple: sign bits, exponent bits, significand
bits, bias, limit code, code of NaN; "ieee" ones alone.

Names: p_ pointers, o_ offsets, b_ values, m_ masks, i_ program ids.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels.compression.accumulation import Noise
from dalle_kernels.compression.formats import MURMUR, WEYL, Format, counter_start, signed

BLOCK = 1024
# A product and a sum in one instruction would round once where the CPU rounds twice.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
INFINITY = tl.constexpr(0x7F800000)
STRIDE = tl.constexpr(WEYL)
FACTOR_1, FACTOR_2 = (tl.constexpr(factor) for _, factor in MURMUR[:2])
SHIFT_1, SHIFT_2, SHIFT_3 = (tl.constexpr(shift) for shift, _ in MURMUR)


def encode_on_gpu(values: Tensor, format: Format, random: Tensor | None, out: Tensor) -> Tensor:
    """`formats.encode` as one kernel."""
    flat, bits = values.reshape(-1), None if random is None else random.reshape(-1)
    if len(flat):
        arguments = [flat, flat if bits is None else bits, out.view(torch.int16), len(flat)]
        constants = {"FORMAT": numbers_of(format), "IS_STOCHASTIC": bits is not None, "BLOCK": BLOCK}
        encode_kernel[(triton.cdiv(len(flat), BLOCK),)](*arguments, **constants, **OPTIONS)
    return out


def decode_on_gpu(codes: Tensor, format: Format, out: Tensor, scale: float) -> Tensor:
    """`formats.decode` as one kernel."""
    flat = codes.reshape(-1)
    if len(flat):
        arguments = [flat.view(torch.int16), out, len(flat), scale]
        constants = {"FORMAT": numbers_of(format), "BLOCK": BLOCK}
        decode_kernel[(triton.cdiv(len(flat), BLOCK),)](*arguments, **constants, **OPTIONS)
    return out


def accumulate_on_gpu(
    codes: Tensor, gradient: Tensor, factor: Tensor, finite: Tensor, format: Format, unit: float, noise: Noise | None
) -> None:
    """`accumulation.accumulate` as one kernel, of one-dimensional tensors."""
    if len(codes):
        arguments, constants = accumulate_arguments(codes, gradient, factor, finite, format, unit, noise)
        accumulate_kernel[(triton.cdiv(len(codes), BLOCK),)](*arguments, **constants, **OPTIONS)


def accumulate_arguments(
    codes: Tensor, gradient: Tensor, factor: Tensor, finite: Tensor, format: Format, unit: float, noise: Noise | None
) -> tuple[list[Any], dict[str, Any]]:
    """What the kernel takes, and its constants."""
    start = 0 if noise is None else signed(counter_start(0, noise.seed, noise.step))
    arguments = [codes.view(torch.int16), gradient, factor, finite.view(torch.uint8), len(codes), start, unit, 1 / unit]
    constants = {"FORMAT": numbers_of(format), "IS_STOCHASTIC": noise is not None, "BLOCK": BLOCK}
    return arguments, constants


def numbers_of(format: Format) -> tuple[int, ...]:
    """The constexpr tuple of a format."""
    bits = format.sign_bits, format.exponent_bits, format.significand_bits
    return *bits, format.bias, format.limit_code, format.nan_code


@triton.jit
def encode_kernel(p_value, p_random, p_code, n, FORMAT: tl.constexpr, IS_STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_random = tl.load(p_random + o, mask=m, other=0) if IS_STOCHASTIC else 0
    b_code = encode(tl.load(p_value + o, mask=m, other=0.0), b_random, FORMAT, IS_STOCHASTIC)
    tl.store(p_code + o, b_code.to(tl.int16), mask=m)


@triton.jit
def decode_kernel(p_code, p_value, n, scale, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_value = decode(tl.load(p_code + o, mask=m, other=0).to(tl.int32), FORMAT)
    tl.store(p_value + o, b_value * scale, mask=m)


@triton.jit(do_not_specialize=["start"])
def accumulate_kernel(
    p_code,
    p_gradient,
    p_factor,
    p_finite,
    n,
    start,
    unit,
    per_unit,
    FORMAT: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Where the gradient is not finite nothing is written.
    m = (o < n) & (tl.load(p_finite) != 0)
    b_sum = decode(tl.load(p_code + o, mask=m, other=0).to(tl.int32), FORMAT) * per_unit
    b_sum += tl.load(p_gradient + o, mask=m, other=0.0).to(tl.float32) * tl.load(p_factor)
    b_random = counter_bits(o, start) if IS_STOCHASTIC else 0
    tl.store(p_code + o, encode(b_sum * unit, b_random, FORMAT, IS_STOCHASTIC).to(tl.int16), mask=m)


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
