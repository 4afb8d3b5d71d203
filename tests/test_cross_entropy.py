"""The chunked cross-entropy against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from dalle_ds.models.cross_entropy import summed_cross_entropy


def case(n=13, dim=5, vocab_size=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, dim, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab_size, dim, generator=generator, dtype=dtype).requires_grad_()
    return x, weight, torch.randint(vocab_size, (n,), generator=generator)


@pytest.mark.parametrize("rows", [1, 4, 13, 50], ids="rows{}".format)
def test_loss_and_both_gradients_equal_the_plain_ones_however_the_rows_are_cut(rows):
    x, weight, targets = case()
    chunked = summed_cross_entropy(x, weight, targets, rows * 7)
    plain = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=0)
    for got, expected in zip(
        torch.autograd.grad(3 * chunked, (x, weight)), torch.autograd.grad(3 * plain, (x, weight)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_gradients_pass_gradcheck():
    x, weight, targets = case(n=4)
    torch.autograd.gradcheck(lambda x, weight: summed_cross_entropy(x, weight, targets, 14), (x, weight))


def test_no_rows_are_a_loss_of_zero_with_zero_gradients():
    x, weight, targets = case(n=0)
    loss = summed_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == x.shape
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_weights_give_a_loss_in_32_bit_and_gradients_that_a_loss_scale_can_lift(dtype):
    x, weight, targets = case(n=40, dim=16, vocab_size=300, dtype=torch.float32)
    expected = torch.autograd.grad(F.cross_entropy(x @ weight.T, targets, reduction="sum"), (x, weight))
    narrow = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
    loss = summed_cross_entropy(*narrow, targets)
    assert loss.dtype is torch.float32
    for got, reference in zip(torch.autograd.grad(loss * 2.0**7, narrow), expected, strict=True):
        assert got.dtype is dtype
        # Inputs, errors and products are rounded to 8 bits of significand in bfloat16.
        error = (got.float() / 2**7 - reference).norm() / reference.norm()
        assert error < 0.02


def test_what_is_held_at_a_time_is_a_chunk_of_logits_and_not_all_of_them():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    x, weight, targets = case(n=256, dim=4, vocab_size=512)
    with Watch():
        summed_cross_entropy(x, weight, targets, 16 * 512).backward()
    assert largest == 16 * 512
