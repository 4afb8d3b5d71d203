"""Block layouts: which blocks of an attention matrix a mask leaves empty, fills in part or in full, by its predicate.

Tests, pictures and the kernels' generic path read them; the structural kernels of the paper's masks need none.
"""

import torch
from torch import Tensor

from dalle_kernels.attention.masks import Mask

EMPTY, PARTIAL, FULL = 0, 1, 2
SIGNS = {EMPTY: ".", PARTIAL: "+", FULL: "#"}


def block_layout(mask: Mask, block_q: int, block_k: int, order: Tensor | None = None) -> Tensor:
    """EMPTY, PARTIAL or FULL for each block, int8 [ceil(n / block_q), ceil(n / block_k)].

    `order` [n] are the positions of the stream in the order of rows and columns, all of them where it is None. A block
    that reaches past the last position is judged by what it holds.
    """
    if order is None:
        order = torch.arange(mask.seq_len)
    n = len(order)
    n_key_block = -(-n // block_k)
    key_block = torch.arange(n, device=order.device) // block_k
    size = torch.bincount(key_block, minlength=n_key_block)  # keys in each block
    rows = []
    # A row of blocks at a time: the whole matrix of a large grid is gigabytes.
    for queries in torch.split(order, block_q):
        seen = mask.sees(queries[:, None], order[None, :]).sum(dim=0)  # [n]
        count = torch.zeros_like(size).index_add_(0, key_block, seen)  # [n_key_block]
        rows.append(torch.where(count == 0, EMPTY, torch.where(count == size * len(queries), FULL, PARTIAL)))
    return torch.stack(rows).to(torch.int8)


def image_order(mask: Mask, transposed: bool = False) -> Tensor:
    """The stream positions of the image states, int64 [image_len]: row by row, or column by column."""
    raster = mask.text_len + torch.arange(mask.image_len).view(mask.grid_height, mask.grid_width)
    return (raster.T if transposed else raster).flatten()


def visited(layout: Tensor) -> float:
    """The share of blocks that are not empty."""
    return (layout != EMPTY).double().mean().item()


def draw(layout: Tensor) -> str:
    """A picture in characters, a line for each row of blocks."""
    return "\n".join("".join(SIGNS[block] for block in row) for row in layout.tolist())
