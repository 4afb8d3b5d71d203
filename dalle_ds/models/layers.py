"""Layers of the prior: each initialises its own parameters, so that ZeRO-3 can shard a model while it is built.

Initialisation follows Sparse Transformers (Child et al. 2019), to which the paper refers for what it leaves unsaid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.models.cross_entropy import summed_cross_entropy

# Child et al. 2019, section 5.2.
INIT_GAIN = 0.125
# The sigmoid form of GELU in Child et al. 2019, section 5.2.
GELU_SLOPE = 1.702


class Linear(nn.Module):
    """x W^T + b with weights N(0, gain / sqrt(n_in)) and biases 0; a gain of 0 makes all weights 0."""

    def __init__(self, n_in: int, n_out: int, *, gain: float = INIT_GAIN, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * (gain / math.sqrt(n_in)))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """Layer normalisation computed in float32, whatever the dtype of its gain and bias.

    With `relaxed` each row is divided by its largest magnitude first, so that squares cannot overflow (CogView's
    PB-relax, Ding et al. 2021, section 2.4); only the epsilon then weighs differently.
    """

    def __init__(self, dim: int, *, relaxed: bool = False) -> None:
        super().__init__()
        self.relaxed = relaxed
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.relaxed:
            x = x / x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return F.layer_norm(x, self.weight.shape, self.weight.float(), self.bias.float())


class MLP(nn.Module):
    """W2 f(W1 x + b1) + b2 with width 4 * dim and f(x) = x sigmoid(1.702 x)."""

    def __init__(self, dim: int, output_gain: float) -> None:
        super().__init__()
        self.up = Linear(dim, 4 * dim)
        self.down = Linear(4 * dim, dim, gain=output_gain)

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
        return F.linear(x, self.weight).float() if targets is None else summed_cross_entropy(x, self.weight, targets)
