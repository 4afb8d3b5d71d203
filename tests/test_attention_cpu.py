"""The CPU paths against the reference in float64: values, all gradients, the future, and what they fall back on."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from dalle_kernels.attention import MASKS, Mask, chunked, cpu
from dalle_kernels.attention.reference import attention_reference
from dalle_kernels.attention.windows import WINDOWS, find_window

# Relative error (2-norm) of output and gradients. Rounding of sums of some hundred products; in bfloat16 the rounding
# of inputs to products (2^-9) and of the result, of which dense attention makes as much (0.2% and 0.4%).
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 6e-3}
# text_len, grid_height, grid_width, conv_kernel: no multiples of a block; kernels wider than the grid; one text state.
GEOMETRIES = [(37, 9, 13, 5), (3, 8, 8, 11), (1, 5, 7, 3), (17, 40, 16, 3), (5, 3, 50, 11)]
CASES = [
    pytest.param(Mask(kind=kind, text_len=T, grid_height=h, grid_width=w, conv_kernel=c), id=f"T{T}-{h}x{w}-{kind}")
    for T, h, w, c in GEOMETRIES
    for kind in MASKS
] + [
    pytest.param(Mask(kind="conv", text_len=T, grid_height=h, grid_width=w, conv_kernel=c, wrap=False), id=f"plain-{h}")
    for T, h, w, c in GEOMETRIES
]
PATHS = {"two-sets": cpu, "one-set": cpu, "chunked": chunked}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """A module with forward and backward; the CPU path is made to take two sets of keys, or one, at every size."""
    monkeypatch.setattr(cpu, "is_local", lambda mask: request.param == "two-sets" and mask.kind in WINDOWS)
    return PATHS[request.param]


def draw(mask, dtype, n=4, B=2, H=3, D=8):
    """q, k, v and the output's gradient as models make them: [B, H, N, D], in memory as [B, N, H, D]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, mask.seq_len, H, D, generator=generator).to(dtype).transpose(1, 2) for _ in range(n)]


def assert_equals_reference(module, mask, q, k, v, do):
    tolerance = TOLERANCE[q.dtype]
    o, lse = module.forward(q, k, v, mask)
    gradients = module.backward(q, k, v, o, lse, do, mask)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    truth = attention_reference(*inputs, mask)
    truths = [truth, *torch.autograd.grad(truth, inputs, do.double())]
    for name, actual, expected in zip(("o", "dq", "dk", "dv"), (o, *gradients), truths, strict=True):
        assert actual.dtype == q.dtype
        assert actual.transpose(1, 2).is_contiguous(), f"{name} is laid out otherwise"
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < tolerance, f"{name} is off by {error:.1e}"
    seen = mask.sees(torch.arange(mask.seq_len)[:, None], torch.arange(mask.seq_len))
    scores = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    assert lse.is_contiguous()
    # The LSE is of order 1, so that this is a relative error too.
    assert (lse - scores.logsumexp(-1)).abs().max() < 5 * tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("mask", CASES)
def test_values_and_gradients_equal_the_reference(path, mask, dtype):
    assert_equals_reference(path, mask, *draw(mask, dtype))


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_full_size_takes_two_sets_of_keys_and_equals_the_reference(kind, dtype, monkeypatch):
    """256 text states and 32 x 32 image states, and heads that are shared out in several parts."""
    monkeypatch.setattr(cpu, "PART_BYTES_SHARED", cpu.PART_BYTES)
    mask = Mask(kind=kind, text_len=256, grid_height=32, grid_width=32)
    assert cpu.is_local(mask)
    q, k, v, do = draw(mask, dtype, B=1, H=5, D=64)
    assert len(list(cpu._parts(q, mask))) > 1
    assert_equals_reference(cpu, mask, q, k, v, do)


@pytest.mark.parametrize("memory", ["heads-first", "every-other-head", "fused"])
def test_other_layouts_of_the_inputs_change_nothing(path, memory):
    mask = Mask(kind="conv", text_len=7, grid_height=6, grid_width=5, conv_kernel=3)
    q, k, v, do = draw(mask, torch.float32, H=4)
    if memory == "heads-first":
        inputs = [x.contiguous() for x in (q, k, v, do)]
    elif memory == "every-other-head":
        inputs = [x.repeat_interleave(2, dim=1)[:, ::2] for x in (q, k, v, do)]
    else:
        inputs = [*torch.stack([q, k, v]).unbind(0), do]
    assert_equals_reference(path, mask, *inputs)


@pytest.mark.parametrize("mask", CASES)
def test_a_later_state_changes_no_bit_of_an_earlier_one(path, mask):
    inputs = draw(mask, torch.float32, n=3)
    before, _ = path.forward(*inputs, mask)
    cut = mask.text_len + mask.image_len // 2
    for x in inputs:
        x[:, :, cut:] = 100 * torch.randn_like(x[:, :, cut:])
    after, _ = path.forward(*inputs, mask)
    assert after[:, :, :cut].equal(before[:, :, :cut])
    assert not after[:, :, cut:].equal(before[:, :, cut:])


def test_the_result_is_the_same_bits_each_time(path):
    mask = Mask(kind="conv", text_len=7, grid_height=9, grid_width=11, conv_kernel=5)
    q, k, v, do = draw(mask, torch.float32)
    results = []
    for _ in range(2):
        o, lse = path.forward(q, k, v, mask)
        results.append((o, lse, *path.backward(q, k, v, o, lse, do, mask)))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("wrap", [True, False], ids=["66", "61"])
def test_no_state_sees_past_its_window(kind, wrap):
    mask = Mask(kind=kind, text_len=2, grid_height=9, grid_width=6, conv_kernel=5, wrap=wrap)
    window = find_window(mask)
    seen = mask.sees(torch.arange(2, 56)[:, None], torch.arange(2, 56))
    query, key = seen.nonzero().T
    step = mask.grid_width if window.by_columns else 1
    assert ((query - key) // step).max() == window.reach


def test_without_torchs_kernels_the_plain_path_runs(monkeypatch):
    mask = Mask(kind="row", text_len=5, grid_height=4, grid_width=5)
    q, k, v, do = draw(mask, torch.float32)
    monkeypatch.setattr(cpu, "has_flash", lambda: False)
    o, lse = cpu.forward(q, k, v, mask)
    assert o.equal(chunked.forward(q, k, v, mask)[0])
    for a, b in zip(cpu.backward(q, k, v, o, lse, do, mask), chunked.backward(q, k, v, o, lse, do, mask), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("change", ["missing", "other-meaning"])
def test_kernels_that_are_missing_or_mean_something_else_are_found_out(monkeypatch, change):
    assert cpu.has_flash()
    if change == "missing":
        monkeypatch.setattr(cpu, "FLASH", "_no_such_operator")
    else:
        flash = cpu._flash
        monkeypatch.setattr(cpu, "_flash", lambda *arguments: (flash(*arguments)[0], flash(*arguments)[1] * 1.4427))
    assert not cpu.has_flash.__wrapped__()


@pytest.mark.parametrize(
    ("grid", "text_len", "local"), [(8, 20, False), (16, 64, True), (32, 256, True)], ids=["tiny", "16x16", "full"]
)
def test_small_grids_take_one_set_of_keys(grid, text_len, local):
    assert cpu.is_local(Mask(kind="row", text_len=text_len, grid_height=grid, grid_width=grid)) is local


def test_the_benchmark_runs(monkeypatch, capsys):
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    threads = ["--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["attention_cpu.py", "--quick", "--clock", "cpu", *threads])
    runpy.run_path(str(folder / "attention_cpu.py"), run_name="__main__")
    assert "| conv, bfloat16 | both |" in capsys.readouterr().out
