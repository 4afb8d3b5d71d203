"""Attention of the last states to all before them: one step of sampling."""

import torch.nn.functional as F
from torch import Tensor

from dalle_kernels.attention.masks import Mask, allowed


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, query_start: int) -> Tensor:
    """Masked attention of some states of a stream to those up to the last of them, as sampling needs it.

    q [B, H, Tq, D] holds the states query_start ... query_start + Tq - 1 of the stream, k and v [B, H, Tk, D] the
    first Tk states. Returns [B, H, Tq, D] in the dtype of q. Raises ValueError when the queries reach past the keys.
    """
    query_end = query_start + q.shape[2]
    if query_end > k.shape[2] or k.shape[2] > mask.seq_len:
        raise ValueError(f"queries end at {query_end}, keys at {k.shape[2]}, the stream at {mask.seq_len}")
    seen = allowed(mask, q.device)[query_start:query_end, : k.shape[2]]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
