"""The fast CPU path: torch's own flash attention over two sets of keys, merged exactly.

Every state attends to text, and an image state to a short window of image states as well. Two calls of torch's CPU
kernel, one with the text as keys and one with all windows as a batch, give two outputs and the logarithms of their
softmax sums (LSE), from which the output over all keys follows exactly. Given that output and its LSE, the kernel's
backward yields each set's share of the gradients; no scores are kept. The kernels are private operators of torch: where
they are missing or mean something else, `chunked` takes over.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_kernels.attention import chunked
from dalle_kernels.attention.masks import Mask, allowed
from dalle_kernels.attention.windows import WINDOWS, find_window, to_raster_order, to_window_order

# Queries of one window; torch's kernel takes 32 at a time where there are fewer than 192.
BLOCK = 32
# Windows begin at a multiple of this; smaller wastes fewer keys and takes more additions in the backward.
STEP = 16
# Two sets of keys pay where they spare this much of the keys of the stream, and there is enough to do (measured on one
# thread, 8 x 8 to 32 x 32 grids; the tiny preset, 8 x 8, takes half the time as one set).
MIN_SAVING, MIN_IMAGE_LEN = 2, 144
# Windows that are worked on at a time, in bytes. On one thread many more are slower: the memory goes back to the system
# after each call (a third of the backward was page faults), and is out of the cache when windows are added up. Several
# threads want more to share out than that costs (1,280 states, 8 heads: conv 1.1 times, row 1.2 times as fast).
PART_BYTES, PART_BYTES_SHARED = 2**20, 2**24

FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """q, k, v [B, H, N, D] of one dtype -> o, of that dtype, and lse [B, H, N], natural logarithm.

    o lies in memory as [B, N, H, D], so that joining the heads copies nothing. lse is float32, or float64 as q is.
    """
    if not has_flash():
        return chunked.forward(q, k, v, mask)
    if not is_local(mask):
        whole_o, whole_lse = _flash(q, k, v, *_dense_rule(mask, q.dtype))
        return _token_major(whole_o), whole_lse.contiguous()
    T, o = mask.text_len, _empty_like(q)
    # Causal with fewer keys than queries: text is causal, and image states, which lie past the keys, see all of them.
    text_o, text_lse = _flash(q, k[:, :, :T], v[:, :, :T], True)
    o[:, :, :T] = text_o[:, :, :T]
    lse = text_lse.contiguous()
    for part in _parts(q, mask):
        window_o, window_lse = _window_forward(q[part], k[part], v[part], mask)
        share = torch.sigmoid(window_lse - lse[part])[..., None]  # of the window in the softmax
        o[part] = torch.addcmul(text_o[part].to(share.dtype), window_o - text_o[part], share)
        lse[part] = torch.logaddexp(lse[part], window_lse)
    return o, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, each [B, H, N, D] in memory as [B, N, H, D], given o's gradient `do`."""
    if not has_flash():
        return chunked.backward(q, k, v, o, lse, do, mask)
    if not is_local(mask):
        dq, dk, dv = _flash_backward(do, q, k, v, o, lse, *_dense_rule(mask, q.dtype))
        return _token_major(dq), _token_major(dk), _token_major(dv)
    T, dq, dk, dv = mask.text_len, _empty_like(q), _empty_like(k), _empty_like(v)
    text_dq, dk[:, :, :T], dv[:, :, :T] = _flash_backward(do, q, k[:, :, :T], v[:, :, :T], o, lse, True)
    dq[:, :, :T] = text_dq[:, :, :T]
    for part in _parts(q, mask):
        window_dq, dk[part], dv[part] = _window_backward(mask, *(x[part] for x in (do, q, k, v, o, lse)))
        dq[part] = text_dq[part] + window_dq
    return dq, dk, dv


def is_local(mask: Mask) -> bool:
    """Whether text and windows are two sets of keys; otherwise the mask runs as one, dense."""
    if mask.kind not in WINDOWS or mask.image_len < MIN_IMAGE_LEN:
        return False
    tiles = _tiles(mask)
    return mask.seq_len >= MIN_SAVING * (mask.text_len + tiles.reach + tiles.size)


@functools.cache
def has_flash() -> bool:
    """Whether torch has its CPU kernels, with the meaning that this module relies on (tried on a few numbers)."""
    if not (hasattr(torch.ops.aten, FLASH) and hasattr(torch.ops.aten, f"{FLASH}_backward")):
        return False
    x = torch.linspace(-2, 2, 5 * 4, dtype=torch.float32, device="cpu").sin().view(1, 1, 5, 4)
    scores = (x @ x[:, :, :3].mT / 2).masked_fill(torch.ones(5, 3, device="cpu").triu(1).bool(), -math.inf)
    weights, value = scores.softmax(dim=-1), x[:, :, :3]
    o, lse = _flash(x, value, value, True)
    gradients = _flash_backward(x, x, value, value, o, lse, True)
    dscores = weights * (x @ value.mT - (x * o).sum(dim=-1, keepdim=True)) / 2
    truth = (weights @ value, scores.logsumexp(dim=-1), dscores @ value, dscores.mT @ x, weights.mT @ x)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip((o, lse, *gradients), truth, strict=True))


def _flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return getattr(torch.ops.aten, FLASH)(q, k, v, 0.0, is_causal, attn_mask=bias)  # type: ignore[no-any-return]


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, is_causal: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    operator = getattr(torch.ops.aten, f"{FLASH}_backward")
    return operator(do, q, k, v, o, lse, 0.0, is_causal, attn_mask=bias)  # type: ignore[no-any-return]


def _empty_like(x: Tensor) -> Tensor:
    """An empty tensor of the shape of x [B, H, N, D], in memory as [B, N, H, D]."""
    B, H, N, D = x.shape
    return x.new_empty(B, N, H, D).transpose(1, 2)


def _token_major(x: Tensor) -> Tensor:
    """x [B, H, N, D] in memory as [B, N, H, D]: a copy where it lies otherwise."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@functools.lru_cache(maxsize=16)
def _dense_rule(mask: Mask, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """is_causal and the bias of the whole mask as one set of keys."""
    if mask.kind == "dense":
        return True, None
    return False, _bias(allowed(mask), dtype)[None, None]


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device="cpu").masked_fill(~seen, -math.inf)


@dataclass(frozen=True)
class _Tiles:
    """Image states in window order as `n` blocks of `size`; the keys of a block begin `reach` before it."""

    n: int
    size: int
    reach: int

    @property
    def padded_len(self) -> int:
        return self.n * self.size


def _tiles(mask: Mask) -> _Tiles:
    window = find_window(mask)
    if window.by_columns:
        return _Tiles(mask.grid_width, mask.grid_height, 0)
    return _Tiles(-(-mask.image_len // BLOCK), BLOCK, -(-window.reach // STEP) * STEP)


@functools.lru_cache(maxsize=16)
def _window_rule(mask: Mask, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """is_causal and the bias of the windows: a column is causal; else bias [1, n, size, reach + size]."""
    if find_window(mask).by_columns:
        return True, None
    tiles = _tiles(mask)
    start = torch.arange(0, tiles.padded_len, tiles.size, device="cpu")[:, None, None]
    query = start + torch.arange(tiles.size, device="cpu")[:, None]
    key = start + torch.arange(-tiles.reach, tiles.size, device="cpu")
    seen = mask.sees(mask.text_len + query, mask.text_len + key) & (key >= 0)
    return False, _bias(seen, dtype)[None]


def _parts(q: Tensor, mask: Mask) -> Iterator[tuple[slice, slice, slice]]:
    """The image states of some heads of one sample at a time: index [b, h, image]."""
    B, H, _, D = q.shape
    tiles = _tiles(mask)
    n_byte = tiles.n * (tiles.reach + tiles.size) * D * torch.promote_types(q.dtype, torch.float32).itemsize
    n_head = max(1, (PART_BYTES if torch.get_num_threads() == 1 else PART_BYTES_SHARED) // n_byte)
    for b in range(B):
        for h in range(0, H, n_head):
            yield slice(b, b + 1), slice(h, h + n_head), slice(mask.text_len, None)


def _window_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Attention of image states [B, H, image_len, D] to their windows alone: o and lse, in at least 32 bit.

    16-bit windows would be no faster forward, and twice as slow backward (torch 2.13).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    o, lse = _flash(_cut(q, mask), _cut_keys(k, mask), _cut_keys(v, mask), *_window_rule(mask, dtype))
    shape = q.shape[:2]
    return _join(o, mask, shape), _join(lse[..., None], mask, shape).squeeze(-1)


def _window_backward(
    mask: Mask, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The windows' share in the gradients of image states, in at least 32 bit."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    do, q, o, lse = (_cut(x, mask) for x in (do, q, o, lse[..., None]))
    keys, values = _cut_keys(k, mask), _cut_keys(v, mask)
    dq, dk, dv = _flash_backward(do, q, keys, values, o, lse.squeeze(-1), *_window_rule(mask, dtype))
    shape = k.shape[:2]
    return _join(dq, mask, shape), _join(_fold(dk, mask), mask, shape), _join(_fold(dv, mask), mask, shape)


def _cut(x: Tensor, mask: Mask) -> Tensor:
    """Image states [B, H, image_len, D] as blocks [B * H, n, size, D]; what is past the image is 0."""
    tiles = _tiles(mask)
    x = to_window_order(x.to(torch.promote_types(x.dtype, torch.float32)), mask)
    if tiles.padded_len > mask.image_len:
        x = F.pad(x, (0, 0, 0, tiles.padded_len - mask.image_len))
    return x.reshape(-1, tiles.n, tiles.size, x.shape[-1])


def _cut_keys(x: Tensor, mask: Mask) -> Tensor:
    """Image states [B, H, image_len, D] as overlapping windows [B * H, n, reach + size, D], all views of one copy."""
    tiles = _tiles(mask)
    if not tiles.reach:
        return _cut(x, mask)
    x = to_window_order(x.to(torch.promote_types(x.dtype, torch.float32)), mask)
    x = F.pad(x, (0, 0, tiles.reach, tiles.padded_len - mask.image_len)).flatten(0, 1)
    return x.unfold(1, tiles.reach + tiles.size, tiles.size).transpose(-1, -2)


def _fold(windows: Tensor, mask: Mask) -> Tensor:
    """The sum of overlapping windows [B * H, n, reach + size, D], as blocks [B * H, n, size, D]."""
    tiles = _tiles(mask)
    if not tiles.reach:
        return windows
    step = BLOCK if tiles.reach % BLOCK == 0 else STEP
    BH, n, window, D = windows.shape
    windows = windows.reshape(BH, n, window // step, step, D)
    stride = tiles.size // step  # steps from one block to the next
    total = windows.new_zeros(BH, tiles.reach // step + n * stride, step, D)
    for i in range(window // step):
        total[:, i : i + n * stride : stride] += windows[:, :, i]
    return total[:, tiles.reach // step :].reshape(BH, n, tiles.size, D)


def _join(blocks: Tensor, mask: Mask, shape: torch.Size) -> Tensor:
    """The inverse of `_cut`: blocks [B * H, n, size, D] -> image states [B, H, image_len, D], for shape (B, H)."""
    x = blocks.flatten(1, 2)[:, : mask.image_len]
    return to_raster_order(x.reshape(*shape, *x.shape[1:]), mask)
