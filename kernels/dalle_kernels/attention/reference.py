"""The truth that every attention path is tested against: softmax over the allowed keys, written out."""

import math

import torch
from torch import Tensor

from dalle_kernels.attention.masks import MaskSpec, allowed


def attention_reference(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, query_start: int = 0) -> Tensor:
    """Masked attention in the precision of its inputs (give float64 for an oracle).

    q [B, H, Tq, D] holds the states query_start ... query_start + Tq - 1 of the stream, k and v [B, H, Tk, D] the
    first Tk states. Returns [B, H, Tq, D].
    """
    mask = allowed(spec, q.device)[query_start : query_start + q.shape[2], : k.shape[2]]
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)
