"""Sparse attention in plain tensor operations, some queries at a time: for devices without a path of their own."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dalle_kernels.attention.layout import image_order
from dalle_kernels.attention.masks import Mask
from dalle_kernels.attention.windows import find_window

# Queries at a time: enough for a matrix product to be quick, and few enough for their scores to stay in the cache.
CHUNK = 128


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """q, k, v [B, H, N, D] of one dtype -> o, of that dtype, and lse [B, H, N], natural logarithm.

    o lies in memory as [B, N, H, D]. lse is float32, or float64 as q is; so are all sums.
    """
    B, H, N, D = q.shape
    o = q.new_empty(B, N, H, D).transpose(1, 2)
    lse = q.new_empty(B, H, N, dtype=torch.promote_types(q.dtype, torch.float32))
    for query, key in _chunks(mask, q.device):
        scores = _scores(q, k, query, key, mask)
        chunk_lse = scores.logsumexp(dim=-1)
        lse[:, :, query] = chunk_lse
        weights = torch.exp(scores - chunk_lse[..., None])
        o[:, :, query] = (weights @ v[:, :, key].to(weights.dtype)).to(o.dtype)
    return o, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, each [B, H, N, D] in memory as [B, N, H, D], given o's gradient `do`."""
    B, H, N, D = q.shape
    dq, dk, dv = (q.new_zeros(B, N, H, D, dtype=lse.dtype).transpose(1, 2) for _ in range(3))
    scale = 1 / math.sqrt(D)
    for query, key in _chunks(mask, q.device):
        weights = torch.exp(_scores(q, k, query, key, mask) - lse[:, :, query, None])
        chunk_do, chunk_o = do[:, :, query].to(lse.dtype), o[:, :, query].to(lse.dtype)
        dv.index_add_(2, key, weights.mT @ chunk_do)
        dweights = chunk_do @ v[:, :, key].to(lse.dtype).mT
        dscores = weights * (dweights - (chunk_do * chunk_o).sum(dim=-1, keepdim=True)) * scale
        dq[:, :, query] = dscores @ k[:, :, key].to(lse.dtype)
        dk.index_add_(2, key, dscores.mT @ q[:, :, query].to(lse.dtype))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _chunks(mask: Mask, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions of some queries, and of all keys that any of them sees."""
    position = torch.arange(mask.seq_len, device=device)
    window = find_window(mask)
    text, image = position[: mask.text_len], image_order(mask, transposed=window.by_columns).to(device)
    for start in range(0, mask.text_len, CHUNK):
        yield text[start : start + CHUNK], text[: start + CHUNK]
    for start in range(0, mask.image_len, CHUNK):
        end = start + CHUNK
        yield image[start:end], torch.cat([text, image[max(0, start - window.reach) : end]])


def _scores(q: Tensor, k: Tensor, query: Tensor, key: Tensor, mask: Mask) -> Tensor:
    """Scaled products of chosen queries and keys, -inf where the mask has none: [B, H, queries, keys]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q[:, :, query].to(dtype) / math.sqrt(q.shape[-1])) @ k[:, :, key].to(dtype).mT
    return scores.masked_fill_(~mask.sees(query[:, None], key), -math.inf)
