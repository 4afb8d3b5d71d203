"""The fused Triton update against the one in torch, bit for bit: in the interpreter, or on a GPU."""

import itertools
from unittest import mock

import pytest
import torch

from dalle_kernels.compression.adam import Update, update_on_cpu

pytest.importorskip("triton")
from triton_without_gpu import assert_lean, bits, interpreting

from dalle_kernels.compression import adam_kernels
from dalle_kernels.compression.codec_kernels import OPTIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDINGS = ("nearest", "stochastic", "kahan")
# dtype of weights and of gradients: in training weights of 16 bits have gradients of 32.
CASES = [
    case
    for case in itertools.product(DTYPES, (16, 32), ROUNDINGS, DTYPES)
    if (case[0] != torch.float32 or case[2] == "nearest") and case[3] in (case[0], torch.float32)
]
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.045, "variance_limit": 5.0}


def case_id(case):
    return "-".join(str(part).removeprefix("torch.") for part in case)


@pytest.fixture(scope="module")
def interpreter():
    with interpreting() as call:
        yield call


# --- what runs in the interpreter or on a GPU -------------------------------------------------------------------------


def make_tensors(dtype, moment_bits, rounding, n, device):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(n, generator=generator).to(dtype)
    moments = [torch.zeros(n, dtype=torch.uint16 if moment_bits == 16 else torch.float32) for _ in range(2)]
    rest = torch.zeros_like(weights) if rounding == "kahan" else None
    tensors = [weights, None, *moments, rest]
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def make_update(step, rounding, position=11):
    return Update.at(step, {**SETTINGS, "rounding": rounding}, seed=7, position=position)


def exact_root(x, out):
    """torch's own on a CPU is off by one unit in the last place for one value in six."""
    return out.copy_(x.double().sqrt())


def count_differences(dtype, moment_bits, rounding, gradient_dtype, device="cpu", n=2500, steps=4):
    """How many weights, moments and compensations differ from torch's on a CPU; all bits count."""
    ours, truth = (make_tensors(dtype, moment_bits, rounding, n, where) for where in (device, "cpu"))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        size = torch.randn(n, generator=generator).mul(8).exp()
        truth[1] = (torch.randn(n, generator=generator) * size).clamp(-1e4, 1e4).to(gradient_dtype)
        ours[1] = truth[1].to(device)
        update = make_update(step, rounding)
        with mock.patch("torch.sqrt", exact_root):
            update_on_cpu(*truth, update)
        adam_kernels.update_on_gpu(*ours, update)
    pairs = [(a, b) for a, b in zip(ours, truth, strict=True) if a is not None]
    return [int((bits(a) != bits(b)).sum()) for a, b in pairs]


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_fused_update_is_torchs_bit_for_bit(interpreter, case):
    assert set(interpreter(count_differences, *case)) == {0}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_update_compiles_without_spills_and_with_wide_loads(capability, tmp_path):
    for case in CASES:
        assert_fit(case, capability, tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_update_without_a_master_compiles_without_spills_and_with_wide_loads(capability, tmp_path):
    assert_fit((torch.float16, 16, "stochastic", torch.float32), capability, tmp_path)


def assert_fit(case, capability, folder):
    dtype, moment_bits, rounding, gradient_dtype = case
    tensors = make_tensors(dtype, moment_bits, rounding, 64, "cpu")
    tensors[1] = tensors[0].to(gradient_dtype)
    arguments, constants = adam_kernels.launch_arguments(*tensors, make_update(1, rounding))
    assert_lean(adam_kernels.adam_kernel, arguments, constants, OPTIONS, capability, folder)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_on_a_gpu_the_fused_update_is_torchs_bit_for_bit(case):
    assert set(count_differences(*case, device="cuda", n=300_000, steps=20)) == {0}


@pytest.mark.gpu
def test_on_a_gpu_the_optimizer_runs_the_kernel():
    from dalle_ds.training.optimizer import CompactAdamW

    weights = [
        torch.nn.Parameter(torch.full((1000,), 0.5, dtype=torch.float16, device=where)) for where in ("cpu", "cuda")
    ]
    for p in weights:
        p.grad_dtype = torch.float32
        optimizer = CompactAdamW([p], lr=1e-3)
        for step in range(3):
            p.grad = torch.linspace(-1, 1, 1000).add(step).to(p.device)
            optimizer.step()
    # One unit in the last place of a weight: the roots differ by one in theirs.
    torch.testing.assert_close(weights[0].detach(), weights[1].detach().cpu(), rtol=2**-10, atol=0)
