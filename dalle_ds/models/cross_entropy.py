"""Cross-entropy of an unembedding without ever holding all of its logits.

At 8 pictures a GPU the logits of both kinds take 0.4 GB in 32 bit, and their gradient as much again. Here rows go
through in chunks: each chunk's logits give its losses and, at once, its share of both gradients.
"""

from typing import Any

import torch
from torch import Tensor

# Rows times vocabulary of the logits held at a time: 128 MiB in float32.
CHUNK_ELEMENTS = 2**25


def summed_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """The sum over rows of -ln softmax(x W^T)[target], in nats; logits, softmax and sums in float32 or wider.

    x [N, dim] and weight [vocab_size, dim] of one dtype, targets int64 [N]; differentiable once, in x and weight.
    """
    rows = max(1, chunk_elements // len(weight))
    return _SummedCrossEntropy.apply(x, weight, targets, rows)  # type: ignore[no-any-return, no-untyped-call]


class _SummedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, where the logits are at hand, and scaled in the backward pass.

    softmax - one_hot lies in [-1, 1] whatever the loss is divided by or scaled with, so that 16 bits hold it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        total = x.new_zeros((), dtype=wide)
        for begin in range(0, len(x), rows):
            part, target = x[begin : begin + rows], targets[begin : begin + rows]
            logits = (part @ weight.T).to(wide)  # [rows, vocab_size]
            log_norm = logits.logsumexp(dim=1, keepdim=True)
            total += (log_norm - logits.gather(1, target[:, None])).sum()
            if not (need_x or need_weight):
                continue
            error = logits.sub_(log_norm).exp_()  # softmax
            error.scatter_add_(1, target[:, None], error.new_full((len(target), 1), -1.0))
            narrow = error.to(weight.dtype)
            if grad_x is not None:
                torch.matmul(narrow, weight, out=grad_x[begin : begin + rows])
            if grad_weight is not None:
                grad_weight += narrow.T @ part
        ctx.dtype = weight.dtype
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else (grad_x * grad).to(grad_x.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtype),
            None,
            None,
        )
