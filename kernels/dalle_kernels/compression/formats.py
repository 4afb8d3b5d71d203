"""Floats of at most 16 bits with any split of exponent and significand, as codes in uint16 (Section 2.4, Appendix D).

A code is sign, exponent, significand, from the highest bit down; `encode` and `decode` go between codes and float32
with vectorised arithmetic alone. The paper keeps Adam's moments and its error buffers in formats of its own:
`ADAM_MEAN`, `ADAM_VARIANCE`, `ERROR_BUFFER`, whose biases it does not give; what speaks for ours stands beside them.

The idea behind both directions: shifted to float32's place, a code of a smaller exponent is a float32 that is too small
by one power of two, the same for all codes, subnormal ones included; so one exact product converts.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FLOAT32_BIAS, FLOAT32_EXPONENT_BITS, FLOAT32_SIGNIFICAND_BITS = 127, 8, 23
EXPONENT_MASK, MAGNITUDE_MASK = 0x7F800000, 0x7FFFFFFF
HALF_BINADE = 0x400000  # the first bit of float32's significand: 1.5 instead of 1
SPECIALS = ("ieee", "nan", "none")


@dataclass(frozen=True, kw_only=True)
class Format:
    """A float of sign, exponent and significand, worth 2**(exponent - bias) * 1.significand, with subnormals.

    `specials`: "ieee" keeps the top exponent for infinities and NaN, "nan" only the last code for NaN, "none" keeps
    nothing (NaN then becomes the largest value). With `saturates`, what is larger than the largest value, infinities
    included, becomes that value; without, what rounds past it becomes infinity, or NaN where there is no infinity.
    Values below 0 become 0 where there is no sign. Raises ValueError for a format that `encode` cannot do exactly.
    """

    sign_bits: int
    exponent_bits: int
    significand_bits: int
    bias: int
    specials: str = "ieee"
    saturates: bool = True

    def __post_init__(self) -> None:
        bits = self.sign_bits, self.exponent_bits, self.significand_bits
        if self.sign_bits not in (0, 1) or self.exponent_bits < 2 or self.significand_bits < 1 or sum(bits) > 16:
            raise ValueError(f"format {bits} must have 0 or 1, at least 2 and at least 1 bits, and 16 in all at most")
        if self.specials not in SPECIALS:
            raise ValueError(f"specials {self.specials!r} must be one of {SPECIALS}")
        if self.specials == "none" and not self.saturates:
            raise ValueError("specials 'none' leaves no code for what is too large: set saturates")
        if self.is_wide:
            return
        # The rounding constant is `shift` binades above the value, and must be a float32.
        top = 2**self.exponent_bits - self.bias + self.shift
        if top >= FLOAT32_BIAS or 1 - self.bias - self.significand_bits < -FLOAT32_BIAS or self.bias < 0:
            raise ValueError(f"bias {self.bias} puts {self.exponent_bits} bits of exponent outside float32's range")

    @property
    def is_wide(self) -> bool:
        """Whether its exponent is float32's own."""
        return (self.exponent_bits, self.bias) == (FLOAT32_EXPONENT_BITS, FLOAT32_BIAS)

    @property
    def bits(self) -> int:
        return self.sign_bits + self.magnitude_bits

    @property
    def magnitude_bits(self) -> int:
        return self.exponent_bits + self.significand_bits

    @property
    def shift(self) -> int:
        """Bits of float32's significand that are rounded away: how many random bits stochastic rounding takes."""
        return FLOAT32_SIGNIFICAND_BITS - self.significand_bits

    @property
    def largest_code(self) -> int:
        """The code of the largest value; the one after it is infinity, or NaN, where there are such codes."""
        reserved = {"ieee": 1 << self.significand_bits, "nan": 1, "none": 0}
        return (1 << self.magnitude_bits) - 1 - reserved[self.specials]

    @property
    def limit_code(self) -> int:
        """What stands for everything too large."""
        return self.largest_code + (not self.saturates)

    @property
    def nan_code(self) -> int:
        quiet = {"ieee": 1 + (1 << (self.significand_bits - 1)), "nan": 1, "none": 0}
        return self.largest_code + quiet[self.specials]

    @cached_property
    def largest(self) -> float:
        return self.value(self.largest_code)

    @cached_property
    def limit(self) -> float:
        """What `limit_code` would be worth as a number, if float32 has such a number."""
        limit = self.value(self.limit_code)
        return limit if limit < 2.0 ** (FLOAT32_BIAS + 1) else math.inf

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest value above 0, a subnormal."""
        return 2.0 ** (1 - self.bias - self.significand_bits)

    def value(self, magnitude: int) -> float:
        """What the code of a magnitude is worth as a number, special or not."""
        exponent, significand = divmod(magnitude, 1 << self.significand_bits)
        if exponent == 0:
            return significand * self.smallest
        return math.ldexp(significand + (1 << self.significand_bits), exponent - self.bias - self.significand_bits)


def encode(
    values: Tensor,
    format: Format,
    *,
    random: Tensor | torch.Generator | None = None,
    out: Tensor | None = None,
    scratch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Codes (uint16) of float32 values, which stay as they are: rounded to nearest even, or stochastically.

    With `random` a value between two codes becomes the upper one with the probability that makes it right on average:
    a generator, or int32 of the shape of `values`, of which the lowest `format.shift` bits are used (below the smallest
    normal value that probability is itself rounded, to that many bits). `out` takes the codes; `scratch` is a pair of
    float32 tensors of the same shape to work in. On a CPU many values without it are encoded a chunk at a time.
    """
    if values.dtype != torch.float32:
        raise ValueError(f"values of {values.dtype} must be float32")
    if isinstance(random, torch.Generator):
        random = torch.randint(
            2**format.shift, values.shape, generator=random, dtype=torch.int32, device=random.device
        ).to(values.device)
    out = torch.empty(values.shape, dtype=torch.uint16, device=values.device) if out is None else out
    if values.is_cuda and format.specials == "ieee":
        from dalle_kernels.compression.codec_kernels import encode_on_gpu

        return encode_on_gpu(values, format, random, out)
    if scratch is None and values.numel() > CHUNK:
        return _encode_in_chunks(values, format, random, out)
    work, other = scratch or (torch.empty_like(values), torch.empty_like(values))
    torch.clamp(values, min=-format.limit if format.sign_bits else 0.0, max=format.limit, out=work)
    if random is not None:
        line = _round_stochastically(work, format, random, other)
    elif format.is_wide:
        line = _round_integers(work, format, other)
    else:
        line = _round_by_addition(work, format, other)
    if format.sign_bits:
        _place_sign(line, values, format, other.view(torch.int32))
    line.bitwise_right_shift_(format.shift)
    if format.bits < 16:
        line.bitwise_and_(2**format.bits - 1)
    out.view(torch.int16).copy_(line)
    _mark_nan(values, format, out)
    return out


def decode(codes: Tensor, format: Format, *, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The float32 values of codes (uint16), exactly; with `scale`, times that number, rounded once; in `out`."""
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device) if out is None else out
    if codes.is_cuda and format.specials == "ieee":
        from dalle_kernels.compression.codec_kernels import decode_on_gpu

        return decode_on_gpu(codes, format, out, scale)
    line = out.view(torch.int32)
    if format.sign_bits and format.bits == 16:
        line.copy_(codes.view(torch.int16)).bitwise_left_shift_(format.shift)  # the sign fills all bits above
    else:
        line.copy_(codes)
        if format.sign_bits:
            line.bitwise_left_shift_(31 - format.magnitude_bits)
            line.bitwise_right_shift_(FLOAT32_EXPONENT_BITS - format.exponent_bits)
        else:
            line.bitwise_left_shift_(format.shift)
    if format.is_wide:
        return out if scale == 1.0 else out.mul_(scale)
    if format.sign_bits:
        line.bitwise_and_(-(2**31) + 2 ** (FLOAT32_SIGNIFICAND_BITS + format.exponent_bits) - 1)
    out.mul_(scale * 2.0 ** (FLOAT32_BIAS - format.bias))
    _restore_specials(format, out, scale)
    return out


def counter_bits(position: int, seed: int, step: int, out: Tensor, scratch: Tensor) -> Tensor:
    """Random bits (int32) for the elements from `position` on: a function of position, seed and step, and no state.

    The finaliser of MurmurHash3 over a Weyl sequence that starts at a mix of seed and step; it comes back to its start
    after 2**32 positions. `out` and `scratch` are int32, one-dimensional, of one length; `out` is returned.
    """
    torch.arange(len(out), out=out, dtype=torch.int32, device=out.device)
    out.mul_(signed(WEYL)).add_(signed(counter_start(position, seed, step)))
    for shift, factor in MURMUR:
        torch.bitwise_right_shift(out, shift, out=scratch)
        out.bitwise_xor_(scratch.bitwise_and_(2 ** (32 - shift) - 1))
        if factor != 1:
            out.mul_(signed(factor))
    return out


def counter_start(position: int, seed: int, step: int) -> int:
    """Where the Weyl sequence of `counter_bits` stands at `position`; below 2**32."""
    key = 0
    for word in (seed, seed >> 32, step):
        key = (_mix(key ^ (word & 0xFFFFFFFF)) + WEYL) & 0xFFFFFFFF
    return (key + position * WEYL) & 0xFFFFFFFF


def _mix(word: int) -> int:
    for shift, factor in MURMUR:
        word ^= word >> shift
        word = word * factor & 0xFFFFFFFF
    return word


def signed(word: int) -> int:
    """The int32 of the same bits."""
    return word - 2**32 if word >= 2**31 else word


def _encode_in_chunks(values: Tensor, format: Format, random: Tensor | None, out: Tensor) -> Tensor:
    scratch = torch.empty(2, CHUNK)
    flat, codes = values.reshape(-1), out.view(-1)
    bits = None if random is None else random.reshape(-1)
    for start in range(0, len(flat), CHUNK):
        part = slice(start, start + CHUNK)
        n = len(flat[part])
        some = None if bits is None else bits[part]
        encode(flat[part], format, random=some, out=codes[part], scratch=(scratch[0, :n], scratch[1, :n]))
    return out


def _round_by_addition(work: Tensor, format: Format, other: Tensor) -> Tensor:
    """Rounded by adding a constant of the value's own exponent, which leaves no room for the bits to drop.

    The sum of float32 rounds to nearest even; the constant of all subnormal values is that of the smallest normal one.
    """
    bits = other.view(torch.int32)
    torch.bitwise_and(work.view(torch.int32), EXPONENT_MASK, out=bits)
    bits.clamp_(min=_float32_bits(format.smallest_normal))
    bits.add_((format.shift << FLOAT32_SIGNIFICAND_BITS) + HALF_BINADE)
    work.add_(other).sub_(other)
    return work.mul_(2.0 ** (format.bias - FLOAT32_BIAS)).view(torch.int32)


def _round_integers(work: Tensor, format: Format, other: Tensor) -> Tensor:
    """Rounded to nearest even as integers, where the exponent is float32's own and so nothing else changes."""
    bits, odd = work.view(torch.int32), other.view(torch.int32)
    torch.bitwise_right_shift(bits, format.shift, out=odd)
    return bits.add_(odd.bitwise_and_(1)).add_(2 ** (format.shift - 1) - 1)


def _round_stochastically(work: Tensor, format: Format, random: Tensor, other: Tensor) -> Tensor:
    """The magnitude plus random bits below its last one; dropping those then rounds down or up.

    A subnormal value gets float32's spacing of the smallest normal one, by adding that.
    """
    work.abs_()
    smallest = format.smallest_normal
    torch.clamp(work, max=smallest, out=other).add_(smallest)
    subnormal = other.view(torch.int32).sub_(_float32_bits(smallest))
    line = work.view(torch.int32).sub_((FLOAT32_BIAS - format.bias) << FLOAT32_SIGNIFICAND_BITS)
    torch.maximum(line, subnormal, out=line)
    torch.bitwise_and(random, 2**format.shift - 1, out=subnormal)
    return line.add_(subnormal)


def _place_sign(line: Tensor, values: Tensor, format: Format, negative: Tensor) -> None:
    """Puts the sign of the value right above the magnitude; what is further up goes with the cast to 16 bits.

    The value's, because what was rounded to 0 has lost its own.
    """
    if format.is_wide:  # else the sign that is there is among what goes
        line.bitwise_and_(MAGNITUDE_MASK)
    torch.bitwise_right_shift(values.view(torch.int32), 31, out=negative)
    line.add_(negative, alpha=-(1 << (FLOAT32_SIGNIFICAND_BITS + format.exponent_bits)))


def _mark_nan(values: Tensor, format: Format, out: Tensor) -> None:
    # On a GPU to ask would be to wait for it.
    if values.is_cuda or torch.isnan(values.sum()):
        code = format.nan_code if format.nan_code < 2**15 else format.nan_code - 2**16
        out.view(torch.int16).masked_fill_(values.isnan(), code)


def _restore_specials(format: Format, out: Tensor, scale: float) -> None:
    """Infinity and NaN for what is past the largest value."""
    beyond = format.largest * scale
    if format.specials == "none" or out.numel() == 0:
        return
    if not out.is_cuda:
        low, high = torch.aminmax(out)
        if max(float(high), -float(low)) <= beyond:
            return
    infinity = format.value(format.largest_code + 1) * scale if format.specials == "ieee" else beyond
    is_nan, is_infinite = out.abs() > infinity, out.abs() > beyond
    out.masked_fill_(is_infinite & (out > 0), math.inf).masked_fill_(is_infinite & (out < 0), -math.inf)
    out.masked_fill_(is_nan, math.nan)


def _float32_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


# Values worked on at a time on a CPU: what they take stays in the cache.
CHUNK = 2**17
WEYL = 0x9E3779B9
# Shifts and factors of MurmurHash3's finaliser.
MURMUR = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))

FLOAT16 = Format(sign_bits=1, exponent_bits=5, significand_bits=10, bias=15, saturates=False)
BFLOAT16 = Format(sign_bits=1, exponent_bits=8, significand_bits=7, bias=127, saturates=False)
FLOAT8_E4M3FN = Format(sign_bits=1, exponent_bits=4, significand_bits=3, bias=7, specials="nan")
FLOAT8_E5M2 = Format(sign_bits=1, exponent_bits=5, significand_bits=2, bias=15, saturates=False)
FORMATS = {
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
    torch.float8_e4m3fn: FLOAT8_E4M3FN,
    torch.float8_e5m2: FLOAT8_E5M2,
}

# "Slightly less than 16" is the largest value of 1-6-9 (Appendix D): (2 - 2**-9) * 2**3. That is bias 59 with a top
# exponent kept for infinities, 60 without; and the paper counts infinities in that format, then clamps them. With 59
# the smallest normal value is 2**-58: float16's smallest gradient, 2**-24, over the largest gradient scale, 2**34.
ADAM_MEAN = Format(sign_bits=1, exponent_bits=6, significand_bits=9, bias=59)
ERROR_BUFFER = ADAM_MEAN
# The same for what is averaged: what does not fit is infinite, so that it is noticed (Appendix E.2, step 10).
CODED = dataclasses.replace(ERROR_BUFFER, saturates=False)
# Nothing is said of 0-6-10's bias, only that the variance is clipped at 5. Bias 60 is the one that reaches lowest and
# still holds 5 (the largest value is just under 8): the root of the smallest value, 2**-69, is 1/200 of Adam's epsilon.
ADAM_VARIANCE = Format(sign_bits=0, exponent_bits=6, significand_bits=10, bias=60)
