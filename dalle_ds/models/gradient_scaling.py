"""Per-resblock gradient scaling, on the model's side (section 2.4, Figure 4).

Between the two ends of a resblock's branch, gradients are multiplied by that resblock's own scale, so that 16 bits hold
them; the residual stream and its gradient stay in 32 bit and unscaled. Values that 16 bits did not hold are set to 0
where they would leave the branch: no other resblock sees them. Gradients of all parameters inside a branch come out
multiplied by the scale; who updates parameters divides by it. `training.gradient_scales` decides the scales.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def begin_branch(x: Tensor, scale: Tensor | None) -> Tensor:
    """Where a branch leaves the stream, before its layer norm: the gradient is divided by `scale` and filtered.

    x is of the stream, float32 or float64; `scale` is a tensor of no dimension, read in the backward pass. Without one
    x is returned as it is.
    """
    return x if scale is None else _Scaled.apply(x, scale, torch.div)  # type: ignore[no-untyped-call]


def end_branch(x: Tensor, scale: Tensor | None) -> Tensor:
    """Where a branch joins the stream, already in its dtype: the gradient is multiplied by `scale` and filtered."""
    return x if scale is None else _Scaled.apply(x, scale, torch.mul)  # type: ignore[no-untyped-call]


def resblock_index(name: str) -> int | None:
    """The resblock that the prior's parameter `name` is in: 2 * layer for attention, 2 * layer + 1 for an MLP, or none.

    The norms of a branch belong to it: their gradients are scaled as well.
    """
    match = IN_RESBLOCK.match(name)
    return None if match is None else 2 * int(match["layer"]) + BRANCHES.index(match["branch"])


class _Scaled(torch.autograd.Function):
    """x itself; its gradient by `operation` with the scale, filtered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        assert x.dtype in STREAM_DTYPES, f"the stream is {x.dtype}"
        ctx.operation = operation
        # Saved so that autograd refuses a backward pass through scales that have changed since the forward pass.
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return _filter_(ctx.operation(grad, scale)), None, None


def _filter_(grad: Tensor) -> Tensor:
    return grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


STREAM_DTYPES = (torch.float32, torch.float64)
BRANCHES = ("attention", "mlp")
# layers.3.mlp.up.weight, layers.3.mlp_norm.bias, layers.3.mlp_end.0.weight
IN_RESBLOCK = re.compile(r"(?:module\.)?layers\.(?P<layer>\d+)\.(?P<branch>attention|mlp)(?:_norm|_end)?\.")
