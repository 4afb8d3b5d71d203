"""The truth that every attention path is tested against: keys named one by one, and softmax over them, written out."""

import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dalle_kernels.attention.masks import Mask, allowed


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask, query_start: int = 0) -> Tensor:
    """Masked attention in the precision of its inputs (give float64 for an oracle).

    q [B, H, Tq, D] holds the states query_start ... query_start + Tq - 1 of the stream, k and v [B, H, Tk, D] the
    first Tk states. Returns [B, H, Tq, D].
    """
    seen = visible(mask).to(q.device)[query_start : query_start + q.shape[2], : k.shape[2]]
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@functools.lru_cache(maxsize=64)
def visible(mask: Mask) -> Tensor:
    """The mask as a boolean matrix [seq_len, seq_len], from the list of keys of each state and not from a predicate.

    A mask that KEYS does not list has its predicate as the only definition. The tensor is shared: do not write to it.
    """
    if mask.kind not in KEYS:
        return allowed(mask)
    T = mask.text_len
    seen = torch.zeros(mask.seq_len, mask.seq_len, dtype=torch.bool)
    for i in range(T):
        seen[i, : i + 1] = True
    for p in range(mask.image_len):
        keys = [key for key in KEYS[mask.kind](p, mask) if 0 <= key <= p]
        seen[T + p, :T] = True
        seen[T + p, T + torch.tensor(keys)] = True
    return seen


def _dense_keys(p: int, mask: Mask) -> Iterable[int]:
    return range(p + 1)


def _row_keys(p: int, mask: Mask) -> Iterable[int]:
    return range(p - mask.grid_width, p + 1)


def _column_keys(p: int, mask: Mask) -> Iterable[int]:
    row, column = divmod(p, mask.grid_width)
    return [above * mask.grid_width + column for above in range(row + 1)]


def _conv_keys(p: int, mask: Mask) -> Iterable[int]:
    """The taps of the kernel by row and column; a tap past a row's edge falls into the neighbouring row."""
    W, reach = mask.grid_width, mask.conv_kernel // 2
    for up in range(reach + 1):
        for across in range(-reach, reach + 1):
            # In a grid narrower than the kernel the taps to the left reach past what closes the window.
            if not mask.wrap or up * W - across < (reach + 1) * W:
                yield p - up * W + across
    if mask.wrap:  # the right half of the row above the kernel, of which the top row's left half is the continuation
        for across in range(1, reach + 1):
            yield p - (reach + 1) * W + across


# Kind -> the raster positions that the image state at p sees; the caller leaves out those before 0 and after p.
KEYS: dict[str, Callable[[int, Mask], Iterable[int]]] = {
    "dense": _dense_keys,
    "row": _row_keys,
    "column": _column_keys,
    "conv": _conv_keys,
}
