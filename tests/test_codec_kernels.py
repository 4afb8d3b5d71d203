"""The codec and sums of gradients in Triton against those in torch, bit for bit: in the interpreter, or on a GPU."""

import itertools

import pytest
import torch

from dalle_kernels.compression.accumulation import Noise, accumulate
from dalle_kernels.compression.formats import ADAM_MEAN, ADAM_VARIANCE, BFLOAT16, CODED, FLOAT16, decode, encode

pytest.importorskip("triton")
from triton_without_gpu import assert_lean, bits, interpreting

from dalle_kernels.compression import codec_kernels

FORMATS = {"mean": ADAM_MEAN, "variance": ADAM_VARIANCE, "coded": CODED, "float16": FLOAT16, "bfloat16": BFLOAT16}
UNIT = 2.0**-10
# Dtype of the gradient, whether it is finite, whether rounding is stochastic.
SUMS = list(itertools.product((torch.float16, torch.float32), (True, False), (False, True)))


@pytest.fixture(scope="module")
def interpreter():
    with interpreting() as call:
        yield call


# --- what runs in the interpreter or on a GPU -------------------------------------------------------------------------


def count_other_codes(name, is_stochastic, device="cpu"):
    """How many codes, and values of codes, differ from formats.py, of every code's value and of any float32."""
    format, generator = FORMATS[name], torch.Generator().manual_seed(0)
    every = decode(torch.arange(2**format.bits, dtype=torch.int32).to(torch.uint16), format)
    any_bits = torch.randint(-(2**31), 2**31, (2**16,), generator=generator, dtype=torch.int64).to(torch.int32)
    values = torch.cat([every, (every[1:] + every[:-1]) / 2, any_bits.view(torch.float32)])
    random = torch.randint(-(2**31), 2**31, values.shape, generator=generator, dtype=torch.int64).to(torch.int32)
    codes = torch.zeros(values.shape, dtype=torch.uint16, device=device)
    bits_of = random.to(device) if is_stochastic else None
    codec_kernels.encode_on_gpu(values.to(device), format, bits_of, codes)
    back = codec_kernels.decode_on_gpu(codes, format, torch.zeros(values.shape, device=device), 1.0)
    truth = encode(values, format, random=random if is_stochastic else None)
    nan, other = values.isnan(), bits(codes) != bits(truth)
    differing = bits(decode(truth, format)) != bits(back)
    return int(other.sum()), int(differing[~nan].sum()), int((~back.cpu()[nan].isnan()).sum())


def count_other_sums(dtype, is_finite, is_stochastic, device="cpu", n=2500, n_added=5):
    """How many sums differ from those of a CPU, after some gradients were added; and how many did not change."""
    generator = torch.Generator().manual_seed(1)
    ours, truth = (torch.zeros(n, dtype=torch.uint16, device=where) for where in (device, "cpu"))
    first = torch.randn(n, generator=generator)
    before = truth
    for k in range(n_added):
        gradient = first if k == 0 else torch.randn(n, generator=generator).mul(6).exp().clamp(max=6e4).to(dtype)
        factor, finite = torch.tensor(2.0**-13 * 1.3), torch.tensor(k == 0 or is_finite)
        noise = Noise(7 + (k << 32), 3) if is_stochastic else None
        accumulate(truth, gradient, factor, finite, CODED, UNIT, noise)
        there = [tensor.to(device) for tensor in (gradient, factor, finite)]
        codec_kernels.accumulate_on_gpu(ours, *there, CODED, UNIT, noise)
        if k == 0:
            before = truth.clone()
    return int((bits(ours) != bits(truth)).sum()), int((bits(before) == bits(truth)).sum())


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_their_values_are_those_of_torch_bit_for_bit(interpreter, name, is_stochastic):
    assert interpreter(count_other_codes, name, is_stochastic) == (0, 0, 0)


@pytest.mark.parametrize(("dtype", "is_finite", "is_stochastic"), SUMS)
def test_sums_are_those_of_a_cpu_bit_for_bit(interpreter, dtype, is_finite, is_stochastic):
    other, unchanged = interpreter(count_other_sums, dtype, is_finite, is_stochastic)
    assert other == 0
    assert (unchanged == 2500) == (not is_finite), "what is not finite is left out"


@pytest.mark.parametrize("capability", [80, 90])
def test_sums_compile_without_spills_and_with_wide_loads(capability, tmp_path):
    for dtype, noise in itertools.product((torch.float16, torch.float32), (None, Noise(1, 2))):
        codes, gradient = torch.zeros(64, dtype=torch.uint16), torch.zeros(64, dtype=dtype)
        numbers = torch.tensor(1.0), torch.tensor(True), CODED, UNIT, noise
        arguments, constants = codec_kernels.accumulate_arguments(codes, gradient, *numbers)
        assert_lean(codec_kernels.accumulate_kernel, arguments, constants, codec_kernels.OPTIONS, capability, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("is_stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu_codes_and_their_values_are_those_of_torch(name, is_stochastic):
    assert count_other_codes(name, is_stochastic, device="cuda") == (0, 0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "is_finite", "is_stochastic"), SUMS)
def test_on_a_gpu_sums_are_those_of_a_cpu(dtype, is_finite, is_stochastic):
    assert count_other_sums(dtype, is_finite, is_stochastic, device="cuda", n=300_000)[0] == 0
