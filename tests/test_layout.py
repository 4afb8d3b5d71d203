"""Block layouts: equal to the predicate block by block, and what the transposed grid does to the column mask."""

import pytest
import torch

from dalle_kernels.attention.layout import EMPTY, FULL, PARTIAL, block_layout, draw, image_order, visited
from dalle_kernels.attention.masks import MASKS, Mask, allowed

GEOMETRIES = [(16, 8, 8), (7, 5, 9), (38, 9, 4)]  # text_len, grid_height, grid_width


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("text_len", "height", "width"), GEOMETRIES)
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (32, 8), (7, 13), (1000, 5)])
def test_a_block_is_empty_full_or_partial_as_its_predicate_is(kind, text_len, height, width, block_q, block_k):
    mask = Mask(kind=kind, text_len=text_len, grid_height=height, grid_width=width, conv_kernel=5)
    layout = block_layout(mask, block_q, block_k)
    assert layout.dtype == torch.int8
    assert layout.shape == (-(-mask.seq_len // block_q), -(-mask.seq_len // block_k))
    for i, rows in enumerate(allowed(mask).split(block_q)):
        for j, block in enumerate(rows.split(block_k, dim=1)):
            expected = FULL if block.all() else PARTIAL if block.any() else EMPTY
            assert layout[i, j] == expected


def test_the_column_mask_is_sparse_in_blocks_only_when_the_grid_is_transposed():
    """Blocks of 64 at 64 x 64 image states: raster order leaves no block out that is not in the future."""
    mask = Mask(kind="column", text_len=256, grid_height=64, grid_width=64)
    raster = block_layout(mask, 64, 64, image_order(mask))
    transposed = block_layout(mask, 64, 64, image_order(mask, transposed=True))
    causal = (64 + 1) / (2 * 64)
    assert visited(raster) == causal
    assert visited(transposed) == 1 / 64  # the diagonal


@pytest.mark.parametrize(
    ("kind", "share"), [("dense", 0.525), ("row", 0.2625), ("column", 0.225), ("conv", 0.33)], ids=str
)
def test_shares_of_tiles_at_full_size_are_those_counted_by_hand(kind, share):
    """64 x 64 tiles at 256 text states and a 32 x 32 grid, 400 in all: text on text 10, image on text 64, and of the
    image on image, where a row of tiles is two rows of the grid, the 16 of the diagonal and those to its left.

    row: the tile before, 15. column, transposed: none. conv: 165 states back, the three tiles before, 15 + 14 + 13.
    """
    mask = Mask(kind=kind, text_len=256, grid_height=32, grid_width=32, wrap=False)
    order = torch.cat([torch.arange(256), image_order(mask, transposed=kind == "column")])
    assert visited(block_layout(mask, 64, 64, order)) == share


def test_a_picture_shows_a_sign_for_each_block():
    mask = Mask(kind="row", text_len=4, grid_height=2, grid_width=4)
    assert draw(block_layout(mask, 4, 4)) == "+..\n#+.\n#++"


def test_image_orders_are_row_by_row_and_column_by_column():
    mask = Mask(kind="row", text_len=5, grid_height=2, grid_width=3)
    assert image_order(mask).tolist() == [5, 6, 7, 8, 9, 10]
    assert image_order(mask, transposed=True).tolist() == [5, 8, 6, 9, 7, 10]
