"""The one public attention function."""

import torch.nn.functional as F
from torch import Tensor

from dalle_kernels.attention.masks import MaskSpec, allowed


def attention(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, query_start: int = 0) -> Tensor:
    """Masked attention over the stream that `spec` describes.

    q [B, H, Tq, D] holds the states query_start ... query_start + Tq - 1 of the stream, k and v [B, H, Tk, D] the
    first Tk states; Tq = Tk = spec.seq_len with query_start 0 in training, and Tq = 1 when sampling from a cache.
    Returns [B, H, Tq, D] in the dtype of q. Raises ValueError when the queries reach past the keys.
    """
    query_end = query_start + q.shape[2]
    if query_end > k.shape[2] or k.shape[2] > spec.seq_len:
        raise ValueError(f"queries end at {query_end}, keys at {k.shape[2]}, the stream at {spec.seq_len}")
    mask = allowed(spec, q.device)[query_start:query_end, : k.shape[2]]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
