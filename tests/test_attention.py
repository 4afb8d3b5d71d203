"""Attention of whole streams and of one state at a time against the reference: values and gradients."""

import pytest
import torch

from dalle_kernels.attention import MASKS, Mask, attention, cached_attention
from dalle_kernels.attention.reference import attention_reference

# Rounding of sums of about a hundred products of order one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
GRID = 5
TEXT_LENS = (1, 7, 38)  # with a grid of 5: streams of 26, 32 and 63 states
CASES = [
    pytest.param(
        Mask(kind=kind, text_len=text_len, grid_height=GRID, grid_width=GRID, conv_kernel=3),
        id=f"T{text_len + 25}-{kind}",
    )
    for text_len in TEXT_LENS
    for kind in MASKS
]


def draw_qkv(spec, dtype=torch.float64, n_key=None):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, n_key or spec.seq_len, 8)  # B, H, T, D
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("spec", CASES)
def test_values_and_gradients_equal_the_reference(spec, dtype):
    results = []
    for function, precision in ((attention, dtype), (attention_reference, torch.float64)):
        inputs = draw_qkv(spec, dtype)
        out = function(*(t.to(precision) for t in inputs), spec)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
        assert out.dtype == precision
    for actual, truth in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), truth.double(), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("spec", CASES)
def test_reference_equals_a_softmax_written_out_state_by_state(spec):
    """The oracle's own oracle: one query at a time over the keys that the predicate names."""
    q, k, v = (t.detach() for t in draw_qkv(spec))
    out = attention_reference(q, k, v, spec)
    for i in range(spec.seq_len):
        p = i - spec.text_len
        keys = [
            j
            for j in range(i + 1)
            if j < spec.text_len or bool(MASKS[spec.kind](torch.tensor(p), torch.tensor(j - spec.text_len), spec))
        ]
        scores = (k[:, :, keys] * q[:, :, i : i + 1]).sum(-1) / 8**0.5
        expected = (scores.softmax(-1)[..., None] * v[:, :, keys]).sum(2)
        torch.testing.assert_close(out[:, :, i], expected, rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("function", [cached_attention, attention_reference], ids=["cached", "reference"])
def test_states_one_at_a_time_equal_the_whole_stream(spec, function):
    q, k, v = (t.detach() for t in draw_qkv(spec))
    whole = attention(q, k, v, spec)
    for i in range(spec.seq_len):
        step = function(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], spec, query_start=i)
        torch.testing.assert_close(step, whole[:, :, i : i + 1], rtol=0, atol=TOLERANCE[torch.float64])


def test_a_chunk_of_queries_starts_where_it_is_told():
    spec = Mask(kind="row", text_len=7, grid_height=GRID, grid_width=GRID)
    q, k, v = (t.detach() for t in draw_qkv(spec))
    chunk = cached_attention(q[:, :, 9:20], k[:, :, :20], v[:, :, :20], spec, query_start=9)
    torch.testing.assert_close(chunk, attention(q, k, v, spec)[:, :, 9:20], rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize("kind", MASKS)
def test_a_state_is_moved_by_no_later_key_and_by_every_text_key(kind):
    spec = Mask(kind=kind, text_len=7, grid_height=GRID, grid_width=GRID, conv_kernel=3)
    q, k, v = (t.detach() for t in draw_qkv(spec))
    grad_keys = torch.autograd.grad(attention(q, k.requires_grad_(), v, spec)[:, :, 12].sum(), k)[0]
    assert grad_keys[:, :, 13:].eq(0).all()
    assert grad_keys[:, :, :7].ne(0).all()


@pytest.mark.parametrize(
    ("n_query", "n_key", "query_start"),
    [pytest.param(5, 4, 0, id="past-keys"), pytest.param(1, 10, 10, id="past-keys-by-start"), (1, 33, 0)],
)
def test_queries_past_the_keys_and_keys_past_the_stream_are_refused(n_query, n_key, query_start):
    spec = Mask(kind="dense", text_len=7, grid_height=GRID, grid_width=GRID)  # 32 states
    q, k = torch.zeros(1, 1, n_query, 8), torch.zeros(1, 1, n_key, 8)
    with pytest.raises(ValueError, match=f"queries end at {query_start + n_query}, keys at {n_key}, the stream at 32"):
        cached_attention(q, k, k, spec, query_start)
