# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""The Householder reflections of a panel of columns as one Triton kernel, a program a matrix.

What `orthogonalize.reflect_panel` does in some twenty operations a column, each a kernel that a GPU waits for. A panel
stays in registers from its first column to its last, so that a program reads it once.

Names: p_ pointers, o_ offsets, b_ values, m_ masks, i_ program ids.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A panel of so many columns and rows takes 32 registers of each thread of 16 warps, and as many more to work in.
WIDTH, MOST_ROWS = 8, 2048
ROWS_A_WARP, MOST_WARPS = 64, 16


def reflect_panel_on_gpu(panel: Tensor, floor: float) -> Tensor:
    """The vectors w [n, rows, columns] of a panel of that shape, of at most MOST_ROWS rows, in float32.

    A column whose norm is not above `floor` counts as zero.
    """
    W = torch.empty(panel.shape, dtype=panel.dtype, device=panel.device)
    arguments, constants, options = launch_arguments(panel, W, floor)
    reflect_panel_kernel[(len(panel),)](*arguments, **constants, **options)
    return W


def launch_arguments(panel: Tensor, W: Tensor, floor: float) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """What the kernel takes, its constants, and the options of its launch."""
    _, rows, columns = panel.shape
    padded = max(16, triton.next_power_of_2(rows))
    constants = {"ROWS": padded, "COLUMNS": triton.next_power_of_2(columns)}
    n_warps = min(MOST_WARPS, max(1, padded // ROWS_A_WARP))
    return [panel, W, rows, columns, *panel.stride(), floor], constants, {"num_warps": n_warps}


@triton.jit
def reflect_panel_kernel(
    p_panel,
    p_w,
    rows,
    columns,
    stride_matrix,
    stride_row,
    stride_column,
    floor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_matrix = tl.program_id(0).to(tl.int64)
    o_row, o_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m = (o_row[:, None] < rows) & (o_column[None, :] < columns)
    p_panel += i_matrix * stride_matrix
    b_panel = tl.load(p_panel + o_row[:, None] * stride_row + o_column[None, :] * stride_column, mask=m, other=0.0)
    for i in range(columns):
        b_x = tl.sum(tl.where(o_column[None, :] == i, b_panel, 0.0), axis=1)
        b_x = tl.where(o_row >= i, b_x, 0.0)
        norm = tl.sqrt(tl.sum(b_x * b_x, axis=0))
        b_w = tl.where(norm > floor, b_x / norm, 0.0)
        first = tl.sum(tl.where(o_row == i, b_w, 0.0), axis=0)
        b_w += tl.where(o_row == i, tl.where(first < 0, -1.0, 1.0), 0.0)
        b_w *= tl.where(norm > floor, 1 / tl.sqrt(1 + tl.abs(first)), 0.0)
        tl.store(p_w + (i_matrix * rows + o_row) * columns + i, b_w, mask=o_row < rows)
        # Columns before this one are done with.
        b_panel -= b_w[:, None] * tl.sum(b_w[:, None] * b_panel, axis=0)[None, :]
