"""The key-value cache of sampling: what each layer has already seen, in buffers of the full length."""

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one layer, for up to `seq_len` states; buffers are made at the first use."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len, self.length = seq_len, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Appends k, v [B, H, n, D]; returns all keys, all values, and the position of the first appended one."""
        if self.keys is None or self.values is None:
            B, H, _, D = k.shape
            self.keys = torch.empty(B, H, self.seq_len, D, dtype=k.dtype, device=k.device)
            self.values = torch.empty_like(self.keys)
        start, end = self.length, self.length + k.shape[2]
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end], start
