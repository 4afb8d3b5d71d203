"""Layers of the prior: each initialises its own parameters, so that ZeRO-3 can shard a model while it is built.

Initialisation follows Sparse Transformers (Child et al. 2019), to which the paper refers for what it leaves unsaid.
Matrices may be stored in 16 bit beside float32 gains and biases, or stored in float32 and computed with in 16 bit.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.models.cross_entropy import summed_cross_entropy

# Child et al. 2019, section 5.2.
INIT_GAIN = 0.125
# The sigmoid form of GELU in Child et al. 2019, section 5.2.
GELU_SLOPE = 1.702


def widen(x: Tensor) -> Tensor:
    """x in float32; in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(nn.Module):
    """x W^T + b, in the dtype of x, with weights N(0, gain / sqrt(n_in)) and biases 0; a gain of 0 makes all weights 0.

    W is stored in `dtype`, drawn in float32 whatever that is, and b in float32. Each gets its gradient in its dtype.
    `transposed` stores W^T [n_in, n_out], so that shards of its rows are cut along the input (Table 2 of the paper).
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        gain: float = INIT_GAIN,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        weight = torch.randn(n_out, n_in) * (gain / math.sqrt(n_in))
        weight = weight.T.contiguous() if transposed else weight
        # Inside DeepSpeed's zero.Init torch.randn may make 16 bits already, which is then what all parameters are in.
        self.weight = nn.Parameter(weight if dtype == torch.float32 else weight.to(dtype))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        is_uniform = self.weight.dtype == x.dtype and (self.bias is None or self.bias.dtype == x.dtype)
        if is_uniform and not self.transposed and not _is_slow(x):
            return F.linear(x, self.weight, self.bias)
        return _MixedLinear.apply(x, self.weight, self.bias, self.transposed)  # type: ignore[no-any-return, no-untyped-call]


class _MixedLinear(torch.autograd.Function):
    """x W^T + b in the dtype of x, for W and b of other dtypes, or a W that is stored transposed.

    The gradient of b is summed and left in float32, as section 2.4 has it for biases. The parameter itself is kept for
    the backward pass, and no cast or view of it: under ZeRO-3 these would hold on to what was gathered.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype, ctx.transposed = None if bias is None else bias.dtype, transposed
        W, b = _upright(weight, transposed).to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.linear(quick(x), quick(W), None if b is None else quick(b)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        W, grad = _upright(weight, ctx.transposed), quick(grad)
        rows = grad.flatten(0, -2)  # [N, n_out]
        # Rounded to the dtype of x before it is that of the parameter, as wherever the product is made in 16 bit.
        return (
            (grad @ quick(W.to(x.dtype))).to(x.dtype) if need_x else None,
            _weight_gradient(rows, quick(x.flatten(0, -2)), ctx.transposed).to(x.dtype).to(weight.dtype)
            if need_weight
            else None,
            rows.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(ctx.bias_dtype) if need_bias else None,
            None,
        )


def _upright(weight: Tensor, transposed: bool) -> Tensor:
    """[n_out, n_in], however it is stored."""
    return weight.T if transposed else weight


def _weight_gradient(grad: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """Of rows [N, n_out] and [N, n_in], laid out as the weight is stored."""
    return x.T @ grad if transposed else grad.T @ x


def _is_slow(x: Tensor) -> bool:
    """torch's float16 product on a CPU takes 9 to 16 times as long as float32's (torch 2.13)."""
    return x.dtype == torch.float16 and x.device.type == "cpu"


def quick(x: Tensor) -> Tensor:
    """An operand of a product, of which the result is to be cast back.

    In float32 where float16 is slow: its values are exact, sums are kept in float32 as on a GPU, and the one rounding
    of the result overflows to infinity as there.
    """
    return x.float() if _is_slow(x) else x


class LayerNorm(nn.Module):
    """Layer normalisation computed in float32, whatever the dtype of its gain and bias; in float64 for float64.

    With `relaxed` each row is divided by its largest magnitude first, so that squares cannot overflow (CogView's
    PB-relax, Ding et al. 2021, section 2.4); only the epsilon then weighs differently.
    """

    def __init__(self, dim: int, *, relaxed: bool = False) -> None:
        super().__init__()
        self.relaxed = relaxed
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = widen(x)
        if self.relaxed:
            x = x / x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype))


class MLP(nn.Module):
    """W2 f(W1 x + b1) + b2 with width 4 * dim and f(x) = x sigmoid(1.702 x)."""

    def __init__(self, dim: int, output_gain: float, matrix_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = Linear(dim, 4 * dim, dtype=matrix_dtype)
        self.down = Linear(4 * dim, dim, gain=output_gain, dtype=matrix_dtype, transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(x * torch.sigmoid(GELU_SLOPE * x))  # type: ignore[no-any-return]


class Head(nn.Module):
    """Final layer norm and unembedding to one vocabulary, in float32 (section 2.4: logits stay in 32 bit)."""

    def __init__(self, dim: int, vocab_size: int, *, relaxed: bool = False) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, relaxed=relaxed)
        self.unembed = Unembedding(dim, vocab_size)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """States [..., dim] -> float32 logits [..., vocab_size]; with targets [N] of states [N, dim], their loss.

        The loss is the sum of the cross-entropies, in nats, made without holding all logits at once.
        """
        return self.unembed(self.norm(x), targets)  # type: ignore[no-any-return]


class Unembedding(nn.Module):
    """One vector a token, all zero at first (Child et al. 2019), so that training starts at a uniform guess."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, dim))

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        x = x.to(self.weight.dtype)
        return widen(F.linear(x, self.weight)) if targets is None else summed_cross_entropy(x, self.weight, targets)
