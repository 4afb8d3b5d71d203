"""The Triton kernels against the float64 reference: in Triton's interpreter here, and on a GPU where there is one.

TRITON_INTERPRET counts when triton is imported, for the whole process; so the interpreter is a process of its own, in
which `measure` runs and hands back errors.
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest import mock

import pytest
import torch

from dalle_kernels.attention.layout import EMPTY, block_layout, image_order
from dalle_kernels.attention.masks import MASKS, Mask
from dalle_kernels.attention.reference import attention_reference, visible

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dalle_kernels.attention import kernels  # noqa: E402

# Relative L2 errors. Four units in the last place for 16 bits (weights and score gradients are rounded to the dtype
# before their product, and so is the result); a sum of hundreds of float32 products is good to some 1e-7.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
GRIDS = {26: (1, 5, 5, 3), 63: (7, 8, 7, 5), 80: (16, 8, 8, 3), 115: (70, 9, 5, 7)}  # text, height, width, conv
KINDS = [*MASKS, "leap"]
FULL_SIZE = {"text_len": 256, "grid_height": 32, "grid_width": 32}


def leap(query, key, mask):
    """A mask that has no structural rule in the kernels: itself, and the state two rows up and one to the left."""
    return (query == key) | (query - key == 2 * mask.grid_width + 1)


def make_mask(kind, seq_len, wrap=True):
    text_len, height, width, conv_kernel = GRIDS[seq_len]
    return Mask(kind=kind, text_len=text_len, grid_height=height, grid_width=width, conv_kernel=conv_kernel, wrap=wrap)


@pytest.fixture(autouse=True)
def _known_leap(monkeypatch):
    monkeypatch.setitem(MASKS, "leap", leap)


@pytest.fixture(scope="module")
def interpreter():
    """Calls a function of this module in a process whose Triton interprets."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):
            pool.submit(torch.set_num_threads, 1).result()
        yield lambda fn, *args, **kwargs: pool.submit(fn, *args, **kwargs).result()


# --- what runs in the interpreter or on a GPU ---------------------------------------------------------------------


def draw_inputs(mask, dtype, head_dim, heads, device, layout):
    """q, k, v and the gradient of the output, [B, H, N, D], in one of the memory layouts of LAYOUTS."""
    generator = torch.Generator().manual_seed(0)
    B, H, N, D = *heads, mask.seq_len, head_dim
    # The last of four, never written to, must not be read either.
    both = torch.randn(B, N, 4, H, D, generator=generator, dtype=torch.float64).to(device, dtype)
    return [LAYOUTS[layout](t) for t in both.unbind(2)]


LAYOUTS = {
    "heads": lambda t: t.transpose(1, 2).contiguous(),
    "fused": lambda t: t.transpose(1, 2),  # views of one [B, N, 4, H, D]
    "tokens-first": lambda t: t.transpose(0, 1).contiguous().permute(1, 2, 0, 3),  # [N, B, H, D]
    "width-apart": lambda t: t.transpose(1, 3).contiguous().permute(0, 2, 3, 1),  # [B, D, H, N]
    "one-for-all-heads": lambda t: t[:, :, :1].expand_as(t).transpose(1, 2),  # a stride of 0
}


def run(mask, inputs):
    """o, lse, dq, dk, dv; what the kernels allocate is full of nan before."""
    q, k, v, do = inputs
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with nan
    try:
        o, lse = kernels.forward(q, k, v, mask)
        return [o, lse, *kernels.backward(q, k, v, o, lse, do, mask)]
    finally:
        torch.use_deterministic_algorithms(False)


def measure(mask, dtype, *, head_dim=16, heads=(1, 2), device="cpu", layout="heads", scale=1.0, capability=None):
    """Relative L2 errors against the reference by name; `capability` chooses the tiles of another GPU."""
    MASKS["leap"] = leap  # a process of its own has a table of its own
    q, k, v, do = draw_inputs(mask, dtype, head_dim, heads, device, layout)
    inputs = [q * scale, k, v, do]
    plan = kernels.plan
    other = {"side_effect": lambda *args: plan(*args[:4], capability or args[4])}
    with mock.patch.object(kernels, "plan", **other):
        actual = run(mask, inputs)
    assert actual[1].dtype == torch.float32
    assert all(t.dtype == dtype for t in (actual[0], *actual[2:]))
    q, k, v = (t.double().requires_grad_() for t in inputs[:3])
    out = attention_reference(q, k, v, mask)
    scores = (q @ k.mT / math.sqrt(head_dim)).masked_fill(~visible(mask).to(device), -math.inf)
    truth = [out, scores.logsumexp(-1), *torch.autograd.grad(out, (q, k, v), do.double())]
    names = ("o", "lse", "dq", "dk", "dv")
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(names, actual, truth, strict=True)}


def count_differing_runs(mask, dtype, n_run, **options):
    inputs = draw_inputs(
        mask, dtype, **{"head_dim": 16, "heads": (1, 1), "device": "cpu", "layout": "heads", **options}
    )
    first = run(mask, inputs)
    return sum(not all(map(torch.equal, first, run(mask, inputs))) for _ in range(n_run - 1))


@triton.jit
def windows_kernel(
    p_keys,
    p_queries,
    n,
    GRID_H: tl.constexpr,
    WINDOW: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The bounds of the window loops of each tile of queries, and of each tile of keys."""
    i = tl.program_id(0)
    start, end = kernels._key_tiles(i * BLOCK_Q, n, i < 0, p_keys, i, GRID_H, WINDOW, REACH, BLOCK_Q, BLOCK_K)
    tl.store(p_keys + 2 * i, start)
    tl.store(p_keys + 2 * i + 1, end)
    start, end = kernels._query_tiles(i * BLOCK_K, n, i < 0, p_keys, i, GRID_H, WINDOW, REACH, BLOCK_Q, BLOCK_K)
    tl.store(p_queries + 2 * i, start)
    tl.store(p_queries + 2 * i + 1, end)


def loop_bounds(mask, block_q, block_k):
    window, reach, _ = kernels.WINDOWS[mask.kind](mask)
    n = -(-mask.image_len // min(block_q, block_k))
    bounds = torch.full((2, n, 2), -1, dtype=torch.int32)
    constants = (mask.grid_height, window.value, reach, block_q, block_k)
    windows_kernel[(n,)](bounds[0], bounds[1], mask.image_len, *constants)
    n_query, n_key = (-(-mask.image_len // block) for block in (block_q, block_k))
    return bounds[0, :n_query].tolist(), bounds[1, :n_key].tolist()


def call_with(*shapes_and_dtypes, mask):
    kernels.forward(*(torch.zeros(shape, dtype=dtype) for shape, dtype in shapes_and_dtypes), mask)


# --- tests --------------------------------------------------------------------------------------------------------


def assert_small(errors, dtype, factor=1.0):
    bad = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype] * factor}
    assert not bad, f"{bad} of {errors}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_len", [63, 80], ids=lambda n: f"T{n}")
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_all_gradients_equal_the_reference(interpreter, kind, seq_len, dtype):
    assert_small(interpreter(measure, make_mask(kind, seq_len), dtype), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq_len", [26, 115], ids=lambda n: f"T{n}")
def test_one_text_state_and_several_tiles_of_text_equal_the_reference(interpreter, kind, seq_len):
    assert_small(interpreter(measure, make_mask(kind, seq_len), torch.float32), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_strides_give_the_same(interpreter, layout):
    errors = interpreter(measure, make_mask("column", 63), torch.float32, heads=(2, 3), layout=layout)
    assert_small(errors, torch.float32)


@pytest.mark.parametrize("head_dim", [32, 64, 128], ids=lambda D: f"D{D}")
def test_every_width_of_a_head_equals_the_reference(interpreter, head_dim):
    assert_small(interpreter(measure, make_mask("conv", 26), torch.float32, head_dim=head_dim), torch.float32)


def test_the_convolution_without_wrap_equals_the_reference(interpreter):
    assert_small(interpreter(measure, make_mask("conv", 63, wrap=False), torch.float32), torch.float32)


def test_scores_in_the_hundreds_overflow_nowhere(interpreter):
    # The error of a weight is that of its score, which here is a hundred times larger.
    errors = interpreter(measure, make_mask("row", 63), torch.float32, scale=100.0)
    assert_small(errors, torch.float32, factor=100.0)


@pytest.mark.parametrize("kind", ["column", "leap"])
def test_two_runs_are_equal_bit_for_bit(interpreter, kind):
    assert interpreter(count_differing_runs, make_mask(kind, 63), torch.float16, 3) == 0


@pytest.mark.parametrize("kind", kernels.WINDOWS)
@pytest.mark.parametrize("seq_len", GRIDS, ids=lambda n: f"T{n}")
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (32, 16), (16, 32)])
def test_window_loops_run_from_the_first_to_the_last_block_that_is_not_empty(
    interpreter, kind, seq_len, block_q, block_k
):
    mask = make_mask(kind, seq_len)
    layout = block_layout(mask, block_q, block_k, image_order(mask, transposed=kind == "column")) != EMPTY
    expected = [
        [[int(row.nonzero().min()), int(row.nonzero().max()) + 1] for row in blocks] for blocks in (layout, layout.T)
    ]
    assert list(interpreter(loop_bounds, mask, block_q, block_k)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_a_head_of_the_full_geometry_with_the_tiles_of_the_table_equals_the_reference(interpreter, kind):
    mask = Mask(kind=kind, **FULL_SIZE)
    errors = interpreter(measure, mask, torch.bfloat16, head_dim=64, heads=(1, 1), capability=90)
    assert_small(errors, torch.bfloat16)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([((1, 1, 62, 16), torch.float32)] * 3, r"shape \(1, 1, 62, 16\) must be \[B, H, 63, D\]"),
        ([((1, 1, 63, 24), torch.float32)] * 3, "head_dim 24 must be one of"),
        ([((1, 1, 63, 16), torch.float64)] * 3, "dtype torch.float64 must be one of"),
        ([((1, 1, 63, 16), torch.float32)] * 2 + [((1, 1, 63, 16), torch.float16)], "equal in shape and dtype"),
        ([((1, 1, 63, 16), torch.float32)] * 2 + [((1, 2, 63, 16), torch.float32)], "equal in shape and dtype"),
    ],
    ids=["length", "head", "dtype", "mixed-dtypes", "mixed-shapes"],
)
def test_matrices_that_do_not_fit_are_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        call_with(*tensors, mask=make_mask("row", 63))


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_len", GRIDS, ids=lambda n: f"T{n}")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_small_streams_equal_the_reference(kind, seq_len, dtype):
    assert_small(measure(make_mask(kind, seq_len), dtype, device="cuda"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS, ids=lambda D: f"D{D}")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_the_full_geometry_equals_the_reference(kind, head_dim, dtype):
    errors = measure(
        Mask(kind=kind, **FULL_SIZE), dtype, head_dim=head_dim, heads=(2, 3), device="cuda", layout="fused"
    )
    assert_small(errors, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu_inputs_of_any_strides_give_the_same(layout):
    errors = measure(make_mask("column", 115), torch.bfloat16, heads=(2, 3), device="cuda", layout=layout)
    assert_small(errors, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_a_thousand_runs_are_equal_bit_for_bit(kind):
    mask = Mask(kind=kind, **FULL_SIZE)
    assert count_differing_runs(mask, torch.bfloat16, 1000, head_dim=64, heads=(2, 8), device="cuda") == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_on_a_gpu_offsets_past_two_to_the_31_are_right(kind):
    """A batch of which the last heads lie more than 2**31 elements in."""
    mask = Mask(kind=kind, text_len=256, grid_height=32, grid_width=32)
    B, H, D = 27, 1024, 64
    q = torch.empty(B, H, mask.seq_len, D, dtype=torch.float16, device="cuda").normal_()
    assert q.numel() > 2**31
    o, _ = kernels.forward(q, q, q, mask)
    last = q[-1:, -1:].double()
    error = (o[-1:, -1:].double() - attention_reference(last, last, last, mask)).norm() / o[-1:, -1:].double().norm()
    assert error.item() <= TOLERANCE[torch.float16]
