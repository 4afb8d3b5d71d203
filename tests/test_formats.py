"""Custom floats against torch's casts, code by code; the paper's formats against what the paper says of them."""

import math

import pytest
import torch

from dalle_kernels.compression.formats import (
    ADAM_MEAN,
    ADAM_VARIANCE,
    ERROR_BUFFER,
    FORMATS,
    Format,
    counter_bits,
    decode,
    encode,
)

PAPER = {"mean": ADAM_MEAN, "variance": ADAM_VARIANCE}
NARROW = Format(sign_bits=1, exponent_bits=3, significand_bits=4, bias=4, specials="none")
ALL = {**{str(dtype).removeprefix("torch."): format for dtype, format in FORMATS.items()}, **PAPER, "narrow": NARROW}
EACH = {"argvalues": list(ALL.values()), "ids": list(ALL)}
CASTS = {"argvalues": list(FORMATS), "ids": [str(dtype).removeprefix("torch.") for dtype in FORMATS]}
N = 2**19


def all_codes(format):
    return torch.arange(2**format.bits, dtype=torch.int32).to(torch.uint16)


def as_dtype(codes, dtype):
    return codes.view(dtype) if dtype.itemsize == 2 else codes.to(torch.uint8).view(dtype)


def as_codes(values):
    """int32, for torch has little arithmetic on uint16."""
    return values.view(torch.uint16 if values.element_size() == 2 else torch.uint8).to(torch.int32)


def hard_values(format):
    """float32 bit patterns of every kind, and for every code its value, the ties beside it, and their neighbours."""
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (N,), generator=generator, dtype=torch.int64).to(torch.int32)
    usual = torch.randn(N, generator=generator) * torch.randn(N, generator=generator).mul(10).exp()
    exact = decode(all_codes(format), format)
    exact = exact[exact.isfinite()].sort().values
    ties = (exact[1:].double() + exact[:-1].double()).div(2).float()
    beside = torch.cat([exact, ties])
    near = [torch.nextafter(beside, torch.tensor(end)) for end in (math.inf, -math.inf)]
    limits = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
    return torch.cat([any_bits.view(torch.float32), usual, beside, *near, limits])


@pytest.mark.parametrize("dtype", **CASTS)
def test_every_code_has_the_value_that_torch_gives_it(dtype):
    codes = all_codes(FORMATS[dtype])
    ours, torchs = decode(codes, FORMATS[dtype]), as_dtype(codes, dtype).float()
    is_nan = torchs.isnan()
    assert torch.equal(ours.isnan(), is_nan)
    assert torch.equal(ours[~is_nan].view(torch.int32), torchs[~is_nan].view(torch.int32))


@pytest.mark.parametrize("dtype", **CASTS)
def test_codes_are_those_of_torchs_cast_bit_for_bit(dtype):
    values = hard_values(FORMATS[dtype])
    ours, torchs = encode(values, FORMATS[dtype]), values.to(dtype)
    is_nan = torchs.float().isnan()
    assert torch.equal(as_codes(ours)[~is_nan], as_codes(torchs)[~is_nan])
    assert decode(ours, FORMATS[dtype])[is_nan].isnan().all()


@pytest.mark.parametrize("format", **EACH)
def test_every_code_comes_back_from_its_value(format):
    values = decode(all_codes(format), format)
    assert int(values.isfinite().sum()) == 2**format.sign_bits * (format.largest_code + 1)
    kept = values.isfinite() if format.saturates else ~values.isnan()
    assert torch.equal(as_codes(encode(values, format))[kept], as_codes(all_codes(format))[kept])


@pytest.mark.parametrize("format", **EACH)
def test_larger_codes_are_larger_values_and_the_sign_is_symmetric(format):
    magnitudes = torch.arange(format.largest_code + 1, dtype=torch.int32)
    values = decode(magnitudes.to(torch.uint16), format)
    assert bool((values.diff() > 0).all())
    assert float(values[-1]) == format.largest
    assert float(values[1]) == format.smallest
    if format.sign_bits:
        negative = decode((magnitudes + 2**format.magnitude_bits).to(torch.uint16), format)
        assert torch.equal(negative, -values)
        some = hard_values(format)
        some = some[~some.isnan()]
        flipped = as_codes(encode(some, format)) ^ 2**format.magnitude_bits
        assert torch.equal(as_codes(encode(-some, format)), flipped)


@pytest.mark.parametrize("format", **EACH)
def test_encoding_is_monotone(format):
    values = hard_values(format)
    values = values[~values.isnan()].sort().values
    rounded = decode(encode(values, format), format)
    assert bool((rounded[1:] >= rounded[:-1]).all())


def test_the_mean_is_what_the_paper_says_of_1_6_9():
    """AMB-8: the bias of 59, with infinities' codes kept, is our reading of "slightly less than 16"."""
    assert (ADAM_MEAN.sign_bits, ADAM_MEAN.exponent_bits, ADAM_MEAN.significand_bits) == (1, 6, 9)
    assert ADAM_MEAN.bias == 59
    assert ADAM_MEAN.largest == 15.984375
    assert ADAM_MEAN.smallest_normal == 2.0**-58  # float16's smallest gradient over the largest gradient scale
    assert ADAM_MEAN.smallest == 2.0**-67
    assert ERROR_BUFFER == ADAM_MEAN
    exact = torch.tensor([2.0**-58, 2.0**-67, 1.0, -15.984375])
    assert torch.equal(decode(encode(exact, ADAM_MEAN), ADAM_MEAN), exact)


def test_the_variance_holds_the_clip_of_5_and_no_sign():
    assert (ADAM_VARIANCE.sign_bits, ADAM_VARIANCE.exponent_bits, ADAM_VARIANCE.significand_bits) == (0, 6, 10)
    assert ADAM_VARIANCE.bias == 60
    assert 5 < ADAM_VARIANCE.largest < 8
    assert decode(encode(torch.tensor([5.0, -1.0]), ADAM_VARIANCE), ADAM_VARIANCE).tolist() == [5.0, 0.0]
    # One binade less would not hold it.
    assert Format(sign_bits=0, exponent_bits=6, significand_bits=10, bias=61).largest < 5
    assert math.sqrt(ADAM_VARIANCE.smallest) < 1e-8 / 100


@pytest.mark.parametrize("format", PAPER.values(), ids=PAPER)
def test_the_papers_formats_clamp_infinities_and_keep_nan(format):
    values = torch.tensor([math.inf, 1e30, format.largest * 1.01, math.nan])
    back = decode(encode(values, format), format)
    assert back[:3].tolist() == [format.largest] * 3
    assert bool(back[3].isnan())
    infinity = torch.tensor([format.largest_code + 1], dtype=torch.int32).to(torch.uint16)
    assert decode(infinity, format).tolist() == [math.inf]


@pytest.mark.parametrize("format", **EACH)
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(format):
    """Every random number once: the mean is then the value itself, exactly."""
    every = torch.arange(2**format.shift, dtype=torch.int32)
    exponents = (1.0, 0.5, format.smallest_normal, format.smallest_normal / 2)
    for value in (exponent * (1 + 0.3) for exponent in exponents):
        values = torch.full_like(every, 0, dtype=torch.float32) + value
        rounded = decode(encode(values, format, random=every), format)
        around = [rounded.min().item(), rounded.max().item()]
        step = around[1] - around[0]
        assert len(rounded.unique()) == 2
        assert around[0] < float(values[0]) < around[1]
        # Below the smallest normal value the probability is a multiple of 2**-shift.
        assert abs(rounded.double().mean().item() - float(values[0])) <= step * 2.0 ** -(format.shift + 1)


@pytest.mark.parametrize("format", **EACH)
def test_stochastic_rounding_keeps_what_the_format_has(format):
    values = decode(all_codes(format), format)
    kept = values.isfinite() if format.saturates else ~values.isnan()
    codes = encode(values, format, random=torch.Generator().manual_seed(0))
    assert torch.equal(as_codes(codes)[kept], as_codes(all_codes(format))[kept])


def test_a_generator_gives_the_same_codes_again():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first, second = (encode(values, ADAM_MEAN, random=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.view(torch.int16), second.view(torch.int16))


@pytest.mark.parametrize("format", **EACH)
def test_given_memory_is_used_and_values_stay(format):
    values = hard_values(format)[:4096]
    before = values.clone()
    scratch, out = (torch.full_like(values, math.nan), torch.full_like(values, math.nan)), torch.empty(4096)
    codes = torch.empty(4096, dtype=torch.uint16)
    assert encode(values, format, out=codes, scratch=scratch) is codes
    assert torch.equal(codes.view(torch.int16), encode(values, format).view(torch.int16))
    assert torch.equal(values.view(torch.int32), before.view(torch.int32))
    assert decode(codes, format, out=out) is out
    assert torch.equal(out.nan_to_num(7.0), decode(codes, format).nan_to_num(7.0))


def test_a_scale_is_multiplied_in_with_one_rounding():
    codes = all_codes(ADAM_MEAN)
    assert torch.equal(decode(codes, ADAM_MEAN, scale=0.9).nan_to_num(), (decode(codes, ADAM_MEAN) * 0.9).nan_to_num())


def test_random_bits_are_a_function_of_position_seed_and_step():
    def draw(position, n, seed=5, step=3):
        out, scratch = (torch.empty(n, dtype=torch.int32) for _ in range(2))
        return counter_bits(position, seed, step, out, scratch)

    whole = draw(2**32 - 1000, 4096)
    assert torch.equal(whole[1500:2500], draw(2**32 + 500, 1000))
    assert not torch.equal(whole, draw(2**32 - 1000, 4096, seed=6))
    assert not torch.equal(whole, draw(2**32 - 1000, 4096, seed=5 + 2**32))
    assert not torch.equal(whole, draw(2**32 - 1000, 4096, step=4))
    # Each bit is set in half of the elements: five standard deviations of 2**16 draws.
    many = draw(0, 2**16)
    shares = torch.stack([(many >> bit & 1).double().mean() for bit in range(32)])
    assert float((shares - 0.5).abs().max()) < 5 * 0.5 / 2**8
    other = draw(0, 2**16, step=4)
    agreeing = torch.stack([((many ^ other) >> bit & 1).double().mean() for bit in range(32)])
    assert float((agreeing - 0.5).abs().max()) < 5 * 0.5 / 2**8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exponent_bits": 8, "significand_bits": 8}, "16 in all at most"),
        ({"exponent_bits": 1}, "at least 2"),
        ({"specials": "some"}, "must be one of"),
        ({"specials": "none", "saturates": False}, "leaves no code"),
        ({"bias": -1}, "outside float32's range"),
        ({"exponent_bits": 8, "significand_bits": 7, "bias": 120}, "outside float32's range"),
    ],
)
def test_formats_that_cannot_be_exact_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Format(**{"sign_bits": 1, "exponent_bits": 6, "significand_bits": 9, "bias": 59, **fields})


def test_values_that_are_no_float32_are_refused():
    with pytest.raises(ValueError, match="must be float32"):
        encode(torch.zeros(1, dtype=torch.float64), ADAM_MEAN)
