"""Self-attention of the prior: projections around the sparse attention of `dalle_kernels`."""

from typing import Protocol

import torch
from torch import Tensor, nn

from dalle_ds.models.layers import Linear, quick
from dalle_kernels.attention import Mask, attention, cached_attention


class LayerCache(Protocol):
    """Keys and values of the states that a layer has seen."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Appends k, v [B, H, n, D]; returns all keys, all values, and the position of the first appended one."""


class SelfAttention(nn.Module):
    """Multi-head attention with three separate projections and one mask."""

    def __init__(
        self, n_head: int, head_dim: int, mask: Mask, output_gain: float, matrix_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        dim = n_head * head_dim
        self.n_head, self.mask = n_head, mask
        self.query, self.key, self.value = (Linear(dim, dim, dtype=matrix_dtype) for _ in range(3))
        self.project = Linear(dim, dim, gain=output_gain, dtype=matrix_dtype)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """The first T states, or with a cache those that follow what it holds: [B, T, dim] -> [B, T, dim]."""
        q, k, v = (
            layer(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )  # [B, H, T, D]
        start = 0
        if cache is not None:
            k, v, start = cache.extend(k, v)
        q, k, v = quick(q), quick(k), quick(v)
        if q.shape[2] == self.mask.seq_len:
            out = attention(q, k, v, self.mask)
        else:
            out = cached_attention(q, k, v, self.mask, start)
        return self.project(out.to(x.dtype).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]
