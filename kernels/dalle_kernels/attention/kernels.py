# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""Block-sparse attention in Triton: forward, gradient of the queries, gradients of keys and values.

Every image state sees all the text and a short window of earlier image states. So each program owns a tile of queries
(of keys, in the last kernel) and runs two loops: one over the text without a mask, one over its window with a predicate
that is computed from positions. A tile of text states has an empty first loop and the causal triangle as its window.
Positions of image states count in the order of the mask: raster, or column by column for `column`, where the window is
then as short as in a row (Figure 11(c)); what lies in memory stays in raster order. No atomics: two runs are equal bit
for bit. A mask without a structural rule in WINDOWS takes its window from a table made from its predicate.

Names: B batch, H heads, N states, D width of a head; p_ pointers, s_ strides, o_ offsets, b_ values, i_ program ids.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels.attention.configs import PASSES, Key, Tile, tile_for
from dalle_kernels.attention.layout import EMPTY, block_layout, image_order
from dalle_kernels.attention.masks import Mask, conv_span

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128)

# How a tile's window is found: a look-up table, a span of offsets, a grid column, a span of which parts are near.
TABLE = tl.constexpr(0)
SPAN = tl.constexpr(1)
COLUMN = tl.constexpr(2)
NEAR = tl.constexpr(3)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# The first pivot of the softmax: finite, so that a row without a key so far has weights 0 and not nan.
LOWEST = tl.constexpr(-1.0e38)
# More than any offset between text states, those past the end of the last tile included.
FAR = tl.constexpr(2**30)


# --- positions --------------------------------------------------------------------------------------------------------


@triton.jit
def _tokens(o_p, is_text, TEXT: tl.constexpr, GRID_H: tl.constexpr, GRID_W: tl.constexpr, WINDOW: tl.constexpr):
    """Positions in the order of the mask -> positions in memory, int64 because they are multiplied by strides."""
    raster = o_p
    if WINDOW == COLUMN:
        raster = (o_p % GRID_H) * GRID_W + o_p // GRID_H
    return tl.where(is_text, o_p, TEXT + raster).to(tl.int64)


@triton.jit
def _in_window(
    o_q,
    o_k,
    is_text,
    p_table,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
    WINDOW: tl.constexpr,
    REACH: tl.constexpr,
    SIDE: tl.constexpr,
):
    """The predicate: whether queries see keys, for positions in the order of the mask that broadcast to a tile."""
    offset = o_q - o_k
    if WINDOW == TABLE:
        IMAGE: tl.constexpr = GRID_H * GRID_W
        listed = tl.load(
            p_table + o_q.to(tl.int64) * IMAGE + o_k, mask=(o_q < IMAGE) & (o_k < IMAGE) & (not is_text), other=0
        )
        seen = tl.where(is_text, offset >= 0, listed != 0)
    else:
        back = o_q % GRID_H if WINDOW == COLUMN else REACH  # in a column, to its top
        reach = tl.where(is_text, FAR, back)
        # Unsigned, one comparison says 0 <= offset <= reach.
        seen = offset.to(tl.uint32) <= reach.to(tl.uint32)
        if WINDOW == NEAR:
            across = (offset + SIDE).to(tl.uint32) % GRID_W
            seen = seen & (is_text | (across <= 2 * SIDE))
    return seen


@triton.jit
def _key_tiles(
    first,
    n,
    is_text,
    p_count,
    i_image_tile,
    GRID_H: tl.constexpr,
    WINDOW: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """First and last + 1 of the tiles of keys that the tile of queries from `first` on may see."""
    end = tl.cdiv(tl.minimum(first + BLOCK_Q, n), BLOCK_K)
    if WINDOW == TABLE:
        start = 0
        end = tl.where(is_text, end, tl.load(p_count + i_image_tile, mask=not is_text, other=0))
    elif WINDOW == COLUMN:
        start = tl.where(is_text, 0, first // GRID_H * GRID_H // BLOCK_K)
    else:
        start = tl.where(is_text, 0, tl.maximum(first - REACH, 0) // BLOCK_K)
    return start, end


@triton.jit
def _query_tiles(
    first,
    n,
    is_text,
    p_count,
    i_image_tile,
    GRID_H: tl.constexpr,
    WINDOW: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """First and last + 1 of the tiles of queries that may see the tile of keys from `first` on."""
    start = first // BLOCK_Q
    last = tl.minimum(first + BLOCK_K, n) - 1
    if WINDOW == TABLE:
        listed = tl.load(p_count + i_image_tile, mask=not is_text, other=0)
        start = tl.where(is_text, start, 0)
        end = tl.where(is_text, tl.cdiv(n, BLOCK_Q), listed)
    elif WINDOW == COLUMN:
        end = tl.cdiv(tl.where(is_text, n, tl.minimum((last // GRID_H + 1) * GRID_H, n)), BLOCK_Q)
    else:
        end = tl.cdiv(tl.where(is_text, n, tl.minimum(last + REACH + 1, n)), BLOCK_Q)
    return start, end


@triton.jit
def _nth_tile(j, is_text, p_index, WINDOW: tl.constexpr):
    """The tile that step j of the window loop visits."""
    if WINDOW == TABLE:
        return tl.where(is_text, j, tl.load(p_index + j, mask=not is_text, other=0))
    else:
        return j


# --- tiles ------------------------------------------------------------------------------------------------------------


@triton.jit
def _load(p, s_n, o_token, inside, D: tl.constexpr, RAGGED: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of a [N, D] matrix -> [len(o_token), D]; without RAGGED all rows are inside."""
    p_rows = p + o_token[:, None] * s_n + tl.arange(0, D)[None, :]
    b = tl.load(p_rows, mask=inside[:, None], other=0.0) if RAGGED else tl.load(p_rows)
    if UPCAST:
        b = b.to(tl.float32)
    return b


@triton.jit
def _load_lse(p_lse, o_token, inside):
    """The base-2 logarithm of the softmax's denominator; infinite for rows outside, whose weights are then 0."""
    return tl.load(p_lse + o_token, mask=inside, other=float("inf")) * LOG2_E


@triton.jit
def _forward_step(
    b_o, b_max, b_sum, b_q, b_k, b_v, seen, SCALE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of keys into the online softmax, in base 2; `seen` [Q, K] is read where MASKED."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [Q, K]
    if MASKED:
        b_s = tl.where(seen, b_s, float("-inf"))
    b_pivot = tl.maximum(b_max, tl.max(b_s, 1) * (SCALE * LOG2_E))
    b_p = tl.exp2(b_s * (SCALE * LOG2_E) - b_pivot[:, None])
    b_shrink = tl.exp2(b_max - b_pivot)
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision=PRECISION)
    return b_o, b_pivot, b_sum


@triton.jit
def _query_gradient_step(
    b_dq, b_q, b_do, b_lse, b_delta, b_k, b_v, seen, SCALE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """What a tile of keys adds to the gradient of the queries, but for the scale; `seen` [Q, K]."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [Q, K]
    b_p = tl.exp2(b_s * (SCALE * LOG2_E) - b_lse[:, None])
    if MASKED:
        b_p = tl.where(seen, b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def _key_gradient_step(
    b_dk,
    b_dv,
    b_k,
    b_v,
    b_q,
    b_do,
    b_lse,
    b_delta,
    seen,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a tile of queries adds to the gradients of keys (but for the scale) and values; `seen` [K, Q]."""
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [K, Q]
    b_p = tl.exp2(b_s * (SCALE * LOG2_E) - b_lse[None, :])
    if MASKED:
        b_p = tl.where(seen, b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_o,
    p_lse,
    p_table,
    p_count,
    p_index,
    s_qb,
    s_qh,
    s_qn,
    s_kb,
    s_kh,
    s_kn,
    s_vb,
    s_vh,
    s_vn,
    s_ob,
    s_oh,
    s_on,
    n_head,
    TEXT: tl.constexpr,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
    WINDOW: tl.constexpr,
    REACH: tl.constexpr,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns BLOCK_Q queries of one head: image tiles first, which have more to do than text tiles."""
    IMAGE: tl.constexpr = GRID_H * GRID_W
    N_IMAGE_TILE: tl.constexpr = (IMAGE + BLOCK_Q - 1) // BLOCK_Q
    N_TILE: tl.constexpr = N_IMAGE_TILE + (TEXT + BLOCK_Q - 1) // BLOCK_Q
    RAGGED_Q: tl.constexpr = TEXT % BLOCK_Q != 0 or IMAGE % BLOCK_Q != 0
    RAGGED_TEXT: tl.constexpr = TEXT % BLOCK_K != 0
    RAGGED_K: tl.constexpr = RAGGED_TEXT or IMAGE % BLOCK_K != 0
    i_tile = tl.program_id(0) % N_TILE
    i_bh = (tl.program_id(0) // N_TILE).to(tl.int64)
    i_b, i_h = i_bh // n_head, i_bh % n_head
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_o += i_b * s_ob + i_h * s_oh
    p_lse += i_bh * (TEXT + IMAGE)

    is_text = i_tile >= N_IMAGE_TILE
    first = tl.where(is_text, i_tile - N_IMAGE_TILE, i_tile) * BLOCK_Q
    n = tl.where(is_text, TEXT, IMAGE)
    o_q = first + tl.arange(0, BLOCK_Q)
    inside_q = o_q < n
    o_token_q = _tokens(o_q, is_text, TEXT, GRID_H, GRID_W, WINDOW)
    b_q = _load(p_q, s_qn, o_token_q, inside_q, D, RAGGED_Q, UPCAST)  # [Q, D]
    b_o = tl.zeros([BLOCK_Q, D], tl.float32)
    b_max = tl.full([BLOCK_Q], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)

    for o_text in tl.range(0, tl.where(is_text, 0, TEXT), BLOCK_K):
        o_k = o_text + tl.arange(0, BLOCK_K)
        inside = o_k < TEXT
        o_token = o_k.to(tl.int64)
        b_k = _load(p_k, s_kn, o_token, inside, D, RAGGED_TEXT, UPCAST)  # [K, D]
        b_v = _load(p_v, s_vn, o_token, inside, D, RAGGED_TEXT, UPCAST)
        b_o, b_max, b_sum = _forward_step(
            b_o, b_max, b_sum, b_q, b_k, b_v, inside[None, :], SCALE, RAGGED_TEXT, PRECISION
        )

    start, end = _key_tiles(first, n, is_text, p_count, i_tile, GRID_H, WINDOW, REACH, BLOCK_Q, BLOCK_K)
    if WINDOW == TABLE:
        p_index += i_tile.to(tl.int64) * ((IMAGE + BLOCK_K - 1) // BLOCK_K)
    for j in tl.range(start, end):
        o_k = _nth_tile(j, is_text, p_index, WINDOW) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = o_k < n
        o_token = _tokens(o_k, is_text, TEXT, GRID_H, GRID_W, WINDOW)
        b_k = _load(p_k, s_kn, o_token, inside, D, RAGGED_K, UPCAST)
        b_v = _load(p_v, s_vn, o_token, inside, D, RAGGED_K, UPCAST)
        seen = _in_window(o_q[:, None], o_k[None, :], is_text, p_table, GRID_H, GRID_W, WINDOW, REACH, SIDE)
        b_o, b_max, b_sum = _forward_step(b_o, b_max, b_sum, b_q, b_k, b_v, seen, SCALE, True, PRECISION)

    tl.store(p_lse + o_token_q, (b_max + tl.log2(b_sum)) * LN_2, mask=inside_q)
    p_rows = p_o + o_token_q[:, None] * s_on + tl.arange(0, D)[None, :]
    tl.store(p_rows, (b_o / b_sum[:, None]).to(p_o.dtype.element_ty), mask=inside_q[:, None])


@triton.jit
def query_gradient_kernel(
    p_q,
    p_k,
    p_v,
    p_o,
    p_do,
    p_dq,
    p_lse,
    p_delta,
    p_table,
    p_count,
    p_index,
    s_qb,
    s_qh,
    s_qn,
    s_kb,
    s_kh,
    s_kn,
    s_vb,
    s_vh,
    s_vn,
    s_ob,
    s_oh,
    s_on,
    s_dob,
    s_doh,
    s_don,
    s_dqb,
    s_dqh,
    s_dqn,
    n_head,
    TEXT: tl.constexpr,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
    WINDOW: tl.constexpr,
    REACH: tl.constexpr,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The forward kernel's tiling; also stores delta = sum(o * do) of each row, which the next kernel reads."""
    IMAGE: tl.constexpr = GRID_H * GRID_W
    N_IMAGE_TILE: tl.constexpr = (IMAGE + BLOCK_Q - 1) // BLOCK_Q
    N_TILE: tl.constexpr = N_IMAGE_TILE + (TEXT + BLOCK_Q - 1) // BLOCK_Q
    RAGGED_Q: tl.constexpr = TEXT % BLOCK_Q != 0 or IMAGE % BLOCK_Q != 0
    RAGGED_TEXT: tl.constexpr = TEXT % BLOCK_K != 0
    RAGGED_K: tl.constexpr = RAGGED_TEXT or IMAGE % BLOCK_K != 0
    i_tile = tl.program_id(0) % N_TILE
    i_bh = (tl.program_id(0) // N_TILE).to(tl.int64)
    i_b, i_h = i_bh // n_head, i_bh % n_head
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_o += i_b * s_ob + i_h * s_oh
    p_do += i_b * s_dob + i_h * s_doh
    p_dq += i_b * s_dqb + i_h * s_dqh
    p_lse += i_bh * (TEXT + IMAGE)
    p_delta += i_bh * (TEXT + IMAGE)

    is_text = i_tile >= N_IMAGE_TILE
    first = tl.where(is_text, i_tile - N_IMAGE_TILE, i_tile) * BLOCK_Q
    n = tl.where(is_text, TEXT, IMAGE)
    o_q = first + tl.arange(0, BLOCK_Q)
    inside_q = o_q < n
    o_token_q = _tokens(o_q, is_text, TEXT, GRID_H, GRID_W, WINDOW)
    b_o = _load(p_o, s_on, o_token_q, inside_q, D, RAGGED_Q, UPCAST)  # [Q, D]
    b_do = _load(p_do, s_don, o_token_q, inside_q, D, RAGGED_Q, UPCAST)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_delta + o_token_q, b_delta, mask=inside_q)
    b_q = _load(p_q, s_qn, o_token_q, inside_q, D, RAGGED_Q, UPCAST)
    b_lse = _load_lse(p_lse, o_token_q, inside_q)
    b_dq = tl.zeros([BLOCK_Q, D], tl.float32)

    for o_text in tl.range(0, tl.where(is_text, 0, TEXT), BLOCK_K):
        o_k = o_text + tl.arange(0, BLOCK_K)
        inside = o_k < TEXT
        o_token = o_k.to(tl.int64)
        b_k = _load(p_k, s_kn, o_token, inside, D, RAGGED_TEXT, UPCAST)  # [K, D]
        b_v = _load(p_v, s_vn, o_token, inside, D, RAGGED_TEXT, UPCAST)
        b_dq = _query_gradient_step(
            b_dq, b_q, b_do, b_lse, b_delta, b_k, b_v, inside[None, :], SCALE, RAGGED_TEXT, PRECISION
        )

    start, end = _key_tiles(first, n, is_text, p_count, i_tile, GRID_H, WINDOW, REACH, BLOCK_Q, BLOCK_K)
    if WINDOW == TABLE:
        p_index += i_tile.to(tl.int64) * ((IMAGE + BLOCK_K - 1) // BLOCK_K)
    for j in tl.range(start, end):
        o_k = _nth_tile(j, is_text, p_index, WINDOW) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = o_k < n
        o_token = _tokens(o_k, is_text, TEXT, GRID_H, GRID_W, WINDOW)
        b_k = _load(p_k, s_kn, o_token, inside, D, RAGGED_K, UPCAST)
        b_v = _load(p_v, s_vn, o_token, inside, D, RAGGED_K, UPCAST)
        seen = _in_window(o_q[:, None], o_k[None, :], is_text, p_table, GRID_H, GRID_W, WINDOW, REACH, SIDE)
        b_dq = _query_gradient_step(b_dq, b_q, b_do, b_lse, b_delta, b_k, b_v, seen, SCALE, True, PRECISION)

    p_rows = p_dq + o_token_q[:, None] * s_dqn + tl.arange(0, D)[None, :]
    tl.store(p_rows, (b_dq * SCALE).to(p_dq.dtype.element_ty), mask=inside_q[:, None])


@triton.jit
def key_gradient_kernel(  # noqa: PLR0915
    p_q,
    p_k,
    p_v,
    p_do,
    p_dk,
    p_dv,
    p_lse,
    p_delta,
    p_table,
    p_count,
    p_index,
    s_qb,
    s_qh,
    s_qn,
    s_kb,
    s_kh,
    s_kn,
    s_vb,
    s_vh,
    s_vn,
    s_dob,
    s_doh,
    s_don,
    s_dkb,
    s_dkh,
    s_dkn,
    s_dvb,
    s_dvh,
    s_dvn,
    n_head,
    TEXT: tl.constexpr,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
    WINDOW: tl.constexpr,
    REACH: tl.constexpr,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns BLOCK_K keys of one head: text tiles first, which all image queries see."""
    IMAGE: tl.constexpr = GRID_H * GRID_W
    N_TEXT_TILE: tl.constexpr = (TEXT + BLOCK_K - 1) // BLOCK_K
    N_TILE: tl.constexpr = N_TEXT_TILE + (IMAGE + BLOCK_K - 1) // BLOCK_K
    RAGGED_K: tl.constexpr = TEXT % BLOCK_K != 0 or IMAGE % BLOCK_K != 0
    RAGGED_IMAGE: tl.constexpr = IMAGE % BLOCK_Q != 0
    RAGGED_Q: tl.constexpr = RAGGED_IMAGE or TEXT % BLOCK_Q != 0
    i_tile = tl.program_id(0) % N_TILE
    i_bh = (tl.program_id(0) // N_TILE).to(tl.int64)
    i_b, i_h = i_bh // n_head, i_bh % n_head
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_do += i_b * s_dob + i_h * s_doh
    p_dk += i_b * s_dkb + i_h * s_dkh
    p_dv += i_b * s_dvb + i_h * s_dvh
    p_lse += i_bh * (TEXT + IMAGE)
    p_delta += i_bh * (TEXT + IMAGE)

    is_text = i_tile < N_TEXT_TILE
    i_image_tile = i_tile - N_TEXT_TILE
    first = tl.where(is_text, i_tile, i_image_tile) * BLOCK_K
    n = tl.where(is_text, TEXT, IMAGE)
    o_k = first + tl.arange(0, BLOCK_K)
    inside_k = o_k < n
    o_token_k = _tokens(o_k, is_text, TEXT, GRID_H, GRID_W, WINDOW)
    b_k = _load(p_k, s_kn, o_token_k, inside_k, D, RAGGED_K, UPCAST)  # [K, D]
    b_v = _load(p_v, s_vn, o_token_k, inside_k, D, RAGGED_K, UPCAST)
    b_dk = tl.zeros([BLOCK_K, D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, D], tl.float32)

    # Every image query sees every text key, so raster order does here. Queries past the last have weights 0 by their
    # lse, and keys past the last are not stored: no mask.
    for o_image in tl.range(0, tl.where(is_text, IMAGE, 0), BLOCK_Q):
        o_q = o_image + tl.arange(0, BLOCK_Q)
        inside = o_q < IMAGE
        o_token = (TEXT + o_q).to(tl.int64)
        b_q = _load(p_q, s_qn, o_token, inside, D, RAGGED_IMAGE, UPCAST)  # [Q, D]
        b_do = _load(p_do, s_don, o_token, inside, D, RAGGED_IMAGE, UPCAST)
        b_lse = _load_lse(p_lse, o_token, inside)
        b_delta = tl.load(p_delta + o_token, mask=inside, other=0.0)
        b_dk, b_dv = _key_gradient_step(
            b_dk, b_dv, b_k, b_v, b_q, b_do, b_lse, b_delta, inside[None, :], SCALE, False, PRECISION
        )

    start, end = _query_tiles(first, n, is_text, p_count, i_image_tile, GRID_H, WINDOW, REACH, BLOCK_Q, BLOCK_K)
    if WINDOW == TABLE:
        p_index += i_image_tile.to(tl.int64) * ((IMAGE + BLOCK_Q - 1) // BLOCK_Q)
    for j in tl.range(start, end):
        o_q = _nth_tile(j, is_text, p_index, WINDOW) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside = o_q < n
        o_token = _tokens(o_q, is_text, TEXT, GRID_H, GRID_W, WINDOW)
        b_q = _load(p_q, s_qn, o_token, inside, D, RAGGED_Q, UPCAST)
        b_do = _load(p_do, s_don, o_token, inside, D, RAGGED_Q, UPCAST)
        b_lse = _load_lse(p_lse, o_token, inside)
        b_delta = tl.load(p_delta + o_token, mask=inside, other=0.0)
        seen = _in_window(o_q[None, :], o_k[:, None], is_text, p_table, GRID_H, GRID_W, WINDOW, REACH, SIDE)
        b_dk, b_dv = _key_gradient_step(b_dk, b_dv, b_k, b_v, b_q, b_do, b_lse, b_delta, seen, SCALE, True, PRECISION)

    o_d = tl.arange(0, D)[None, :]
    p_rows = p_dk + o_token_k[:, None] * s_dkn + o_d
    tl.store(p_rows, (b_dk * SCALE).to(p_dk.dtype.element_ty), mask=inside_k[:, None])
    p_rows = p_dv + o_token_k[:, None] * s_dvn + o_d
    tl.store(p_rows, b_dv.to(p_dv.dtype.element_ty), mask=inside_k[:, None])


# --- launches ---------------------------------------------------------------------------------------------------------


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Attention over the whole stream, image states in raster order: o [B, H, N, D] and lse [B, H, N].

    q, k, v [B, H, N, D] with N = mask.seq_len, any strides, one dtype of DTYPES, D of HEAD_DIMS; o has their dtype and
    lies in memory as [B, N, H, D]; lse, the natural logarithm of the softmax's denominator, is float32 and contiguous.
    Raises ValueError for other shapes and dtypes.
    """
    q, k, v = (_rows_contiguous(tensor) for tensor in (q, k, v))
    _check(mask, q, k, v)
    B, H, N, _ = q.shape
    o = _token_major_like(q)
    lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    _launch("forward", mask, (q, k, v, o), (lse,))
    return o, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients dq, dk, dv [B, H, N, D] of what `forward` gave for q, k, v, from do, the gradient of o.

    They lie in memory as [B, N, H, D]. Raises ValueError as `forward` does.
    """
    q, k, v, o, do = (_rows_contiguous(tensor) for tensor in (q, k, v, o, do))
    _check(mask, q, k, v, o, do)
    dq, dk, dv = (_token_major_like(q) for _ in range(3))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    _launch("query_gradient", mask, (q, k, v, o, do, dq), (lse, delta))
    _launch("key_gradient", mask, (q, k, v, do, dk, dv), (lse, delta))
    return dq, dk, dv


@dataclass(frozen=True)
class Plan:
    """A kernel with the constants that it is compiled with."""

    kernel: Any
    constants: dict[str, Any]
    tile: Tile


def plan(name: str, mask: Mask, head_dim: int, dtype: torch.dtype, capability: int, tile: Tile | None = None) -> Plan:
    """What runs as the pass `name` on a GPU of that compute capability (90 for 9.0); `tile` overrides the table."""
    if tile is None:
        key = Key(capability, mask.kind, head_dim, str(dtype).removeprefix("torch."), mask.text_len)
        tile = tile_for(name, key, mask)
    window, reach, side = WINDOWS.get(mask.kind, _table_window)(mask)
    constants = {
        "TEXT": mask.text_len,
        "GRID_H": mask.grid_height,
        "GRID_W": mask.grid_width,
        "WINDOW": window.value,
        "REACH": reach,
        "SIDE": side,
        "D": head_dim,
        "SCALE": head_dim**-0.5,
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        # Triton's interpreter computes on the raw bits of bfloat16.
        "UPCAST": is_interpreted() and dtype == torch.bfloat16,
        "PRECISION": "ieee",
    }
    return Plan(KERNELS[name], constants, tile)


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when this module was imported: the kernels then run on CPU tensors."""
    return not isinstance(forward_kernel, triton.JITFunction)


def _launch(name: str, mask: Mask, matrices: tuple[Tensor, ...], vectors: tuple[Tensor, ...]) -> None:
    """Runs a pass over [B, H, N, D] matrices and [B, H, N] vectors, in the order of the kernel's arguments."""
    B, H, _, D = matrices[0].shape
    device, dtype = matrices[0].device, matrices[0].dtype
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    chosen = plan(name, mask, D, dtype, 10 * major + minor)
    block_q, block_k = chosen.tile.block_q, chosen.tile.block_k
    block = block_k if name == "key_gradient" else block_q
    n_tile = triton.cdiv(mask.text_len, block) + triton.cdiv(mask.image_len, block)
    tables: tuple[Tensor | None, ...] = (None, None, None)
    if chosen.constants["WINDOW"] == TABLE.value:
        pattern, by_query, by_key = _tables(mask, block_q, block_k, device)
        tables = (pattern, *(by_key if name == "key_gradient" else by_query))
    strides = [stride for matrix in matrices for stride in matrix.stride()[:3]]
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        chosen.kernel[(B * H * n_tile,)](
            *matrices,
            *vectors,
            *tables,
            *strides,
            H,
            **chosen.constants,
            num_warps=chosen.tile.n_warps,
            num_stages=chosen.tile.n_stages,
        )


@functools.lru_cache(maxsize=32)
def _tables(
    mask: Mask, block_q: int, block_k: int, device: torch.device
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The predicate over image states as uint8 [image_len, image_len], and lists of the blocks that are not empty.

    The lists are for tiles of queries and for tiles of keys: how many, int32 [n], and which, int32 [n, all].
    """
    order = image_order(mask)
    pattern = torch.cat([mask.sees(rows[:, None], order).to(torch.uint8) for rows in order.split(1024)])
    layout = block_layout(mask, block_q, block_k, order) != EMPTY
    return pattern.to(device), _lists(layout, device), _lists(layout.T, device)


def _lists(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many of each row are set, and which: those that are come first, in order."""
    index = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1).to(device, torch.int32), index.to(device, torch.int32).contiguous()


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _token_major_like(q: Tensor) -> Tensor:
    B, H, N, D = q.shape
    return torch.empty(B, N, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)


def _check(mask: Mask, *matrices: Tensor) -> None:
    shape, dtype = matrices[0].shape, matrices[0].dtype
    for matrix in matrices:
        if matrix.shape != shape or matrix.dtype != dtype:
            found = ", ".join(f"{tuple(m.shape)} {m.dtype}" for m in matrices)
            raise ValueError(f"the matrices must be equal in shape and dtype, and are {found}")
    if len(shape) != 4 or shape[2] != mask.seq_len:
        raise ValueError(f"matrices of shape {tuple(shape)} must be [B, H, {mask.seq_len}, D], as the mask's stream")
    if shape[3] not in HEAD_DIMS:
        raise ValueError(f"head_dim {shape[3]} must be one of {HEAD_DIMS}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} must be one of {DTYPES}")


def _dense_window(mask: Mask) -> tuple[Any, int, int]:
    return SPAN, mask.image_len, 0


def _row_window(mask: Mask) -> tuple[Any, int, int]:
    return SPAN, mask.grid_width, 0


def _column_window(mask: Mask) -> tuple[Any, int, int]:
    return COLUMN, mask.grid_height, 0


def _conv_window(mask: Mask) -> tuple[Any, int, int]:
    side = mask.conv_kernel // 2
    # As wide as the grid, every offset is near.
    return (NEAR if mask.conv_kernel < mask.grid_width else SPAN), conv_span(mask), side


def _table_window(mask: Mask) -> tuple[Any, int, int]:
    return TABLE, 0, 0


# Kind -> the structural rule: how the window is found, its largest offset, and how far to the side is near.
WINDOWS: dict[str, Callable[[Mask], tuple[Any, int, int]]] = {
    "dense": _dense_window,
    "row": _row_window,
    "column": _column_window,
    "conv": _conv_window,
}
KERNELS = dict(zip(PASSES, (forward_kernel, query_gradient_kernel, key_gradient_kernel), strict=True))
