"""The operator: its registration, compilation, activation checkpointing, autocast, counts, and what it refuses."""

import functools

import pytest
import torch
from torch.utils import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dalle_kernels.attention import MASKS, Mask, attention, cpu, ops
from dalle_kernels.attention.ops import DEFAULTS, IMPLEMENTATIONS, count_pairs
from dalle_kernels.attention.reference import attention_reference
from dalle_kernels.attention.windows import WINDOWS

ROW = Mask(kind="row", text_len=5, grid_height=4, grid_width=5)
CPU_PATHS = ("cpu", "chunked")


@pytest.fixture(autouse=True)
def _two_sets_of_keys_at_every_size(monkeypatch):
    monkeypatch.setattr(cpu, "is_local", lambda mask: mask.kind in WINDOWS)


def draw(mask=ROW, dtype=torch.float32, n=3):
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(2, mask.seq_len, 3, 8, generator=generator).to(dtype).transpose(1, 2) for _ in range(n))
    return [x.requires_grad_() for x in tensors]


def numbers(mask, path="cpu"):
    return mask.kind, mask.text_len, mask.grid_height, mask.grid_width, mask.conv_kernel, mask.wrap, path


def gradients(function, inputs):
    """Output and gradients of all inputs, under a weight that is not the same everywhere."""
    out = function(*inputs)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_operators_are_registered_as_torch_demands(kind, dtype):
    mask = Mask(kind=kind, text_len=5, grid_height=4, grid_width=5, conv_kernel=3)
    q, k, v = draw(mask, dtype)
    torch.library.opcheck(torch.ops.dalle_kernels.attention.default, (q, k, v, *numbers(mask)))
    q, k, v = q.detach(), k.detach(), v.detach()
    o, lse = torch.ops.dalle_kernels.attention(q, k, v, *numbers(mask))
    backward = torch.ops.dalle_kernels.attention_backward.default
    torch.library.opcheck(backward, (q, k, v, o, lse, torch.randn_like(o), *numbers(mask)))


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("kind", MASKS)
def test_gradients_equal_differences(kind, path):
    mask = Mask(kind=kind, text_len=3, grid_height=3, grid_width=4, conv_kernel=3)
    inputs = [x.detach()[:1, :1, :, :2].requires_grad_() for x in draw(mask, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask, implementation=path), inputs)


@pytest.mark.parametrize("implementation", ["cpu", "chunked", "dense", "reference"])
def test_every_implementation_gives_the_same(implementation):
    truth = gradients(lambda *x: attention_reference(*x, ROW), draw(dtype=torch.float64))
    actual = gradients(lambda *x: attention(*x, ROW, implementation=implementation), draw())
    for a, b in zip(actual, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)  # sums of some 30 products of order one


def test_a_gradient_without_strides_is_read_rightly():
    """Regression: that of a sum has stride 0 everywhere, and kernels ask for rows that are contiguous."""
    inputs, truths = draw(), draw(dtype=torch.float64)
    actual = torch.autograd.grad(attention(*inputs, ROW).sum(), inputs)
    expected = torch.autograd.grad(attention_reference(*truths, ROW).sum(), truths)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)


def test_the_softmax_sum_carries_no_gradient():
    o, lse = torch.ops.dalle_kernels.attention(*draw(), *numbers(ROW))
    assert o.requires_grad
    assert not lse.requires_grad


def test_a_second_derivative_is_refused_rather_than_wrong():
    inputs = draw()
    (first, *_) = torch.autograd.grad(attention(*inputs, ROW).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use implementation='reference'"):
        first.sum().backward()


def test_compiled_whole_it_gives_the_same():
    projection = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))

    def block(q, k, v):
        out = attention(q * 2, k, v, ROW)
        return out.transpose(1, 2).flatten(-2) @ projection

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, draw()), gradients(block, draw()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)  # sums of 24 products may be taken in another order


def keep_attention(_, op, *args, **kwargs):
    kept = op == torch.ops.dalle_kernels.attention.default
    return checkpoint.CheckpointPolicy.MUST_SAVE if kept else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE


def deepspeed_checkpoint(function, *inputs):
    from deepspeed.runtime.activation_checkpointing import checkpointing

    return checkpointing.checkpoint(function, *inputs)


CHECKPOINTS = {
    "reentrant": functools.partial(checkpoint.checkpoint, use_reentrant=True),
    "non-reentrant": functools.partial(checkpoint.checkpoint, use_reentrant=False),
    "selective": functools.partial(
        checkpoint.checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(checkpoint.create_selective_checkpoint_contexts, keep_attention),
    ),
    "deepspeed": deepspeed_checkpoint,
}


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpointed_it_gives_the_same_bits(how):
    def block(q, k, v):
        return attention(q.sin(), k.cos(), v, ROW).exp()

    plain = gradients(block, draw())
    for a, b in zip(gradients(functools.partial(CHECKPOINTS[how], block), draw()), plain, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize(("how", "runs"), [("non-reentrant", 2), ("selective", 1)])
def test_a_selective_checkpoint_does_not_run_attention_again(how, runs, monkeypatch):
    calls = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    gradients(functools.partial(CHECKPOINTS[how], lambda *x: attention(*x, ROW).exp()), draw())
    assert len(calls) == runs


def test_autocast_runs_all_in_its_dtype_and_gives_gradients_in_that_of_the_inputs():
    inputs = draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(inputs[0], inputs[1].bfloat16(), inputs[2], ROW)
    assert out.dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(out.float().sum(), inputs)} == {torch.float32}
    truth = attention(*(x.bfloat16() for x in inputs), ROW)
    assert out.equal(truth)


def test_on_the_meta_device_shapes_come_out():
    q, k, v = (x.detach().to("meta").requires_grad_() for x in draw())
    out = attention(q, k, v, ROW)
    assert out.shape == q.shape
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


@pytest.mark.parametrize("kind", MASKS)
def test_flops_are_counted_by_pairs_that_the_mask_has(kind):
    mask = Mask(kind=kind, text_len=5, grid_height=4, grid_width=5, conv_kernel=3)
    inputs = draw(mask)
    seen = mask.sees(torch.arange(25)[:, None], torch.arange(25))
    assert count_pairs(mask) == int(seen.sum())
    with FlopCounterMode(display=False) as counter:
        attention(*inputs, mask).sum().backward()
    # 2 samples, 3 heads of 8: two products forward, five backward, each of a multiplication and an addition.
    assert counter.get_total_flops() == 2 * 3 * 8 * int(seen.sum()) * (4 + 10)


def test_a_gpu_gets_triton_a_cpu_its_own_path_and_other_devices_plain_operations(monkeypatch):
    assert DEFAULTS == {"cuda": "triton", "cpu": "cpu"}
    assert set(IMPLEMENTATIONS) == {"triton", "cpu", "chunked", "dense", "reference"}
    asked = []
    monkeypatch.setitem(ops.IMPLEMENTATIONS, "chunked", lambda *_: asked.append("chunked"))
    attention(*(x.detach().to("meta") for x in draw()), ROW)
    assert asked == ["chunked"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"implementation": "cuda"},
            "implementation 'cuda' is unknown; known ones are triton, cpu, chunked, dense, ref",
        ),
        ({"mask": Mask(kind="row", text_len=4, grid_height=4, grid_width=5)}, r"all must be \[B, H, 24, D\]"),
        ({"k": torch.zeros(2, 3, 25, 4)}, r"\(2, 3, 25, 8\), \(2, 3, 25, 4\)"),
        ({"v": torch.zeros(2, 3, 25, 8, dtype=torch.float64)}, "torch.float64; all must have one dtype"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    arguments = {**dict(zip("qkv", draw(), strict=True)), "mask": ROW, **change}
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
