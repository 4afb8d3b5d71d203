"""The masks against Figure 11 of the paper, decoded cell by cell, its counts at full size, and lists of keys."""

import pytest
import torch

from dalle_kernels.attention.masks import MASKS, Mask, allowed
from dalle_kernels.attention.reference import visible

# Figure 11: 6 text states, a 4 x 4 grid, convolution of side 3. The raster offsets that an image state sees.
FIGURE_TEXT_LEN, FIGURE_GRID = 6, 4
FIGURE_OFFSETS = {
    "dense": set(range(16)),
    "row": {0, 1, 2, 3, 4},
    "column": {0, 4, 8, 12},
    "conv": {0, 1, 3, 4, 5, 7},
}
# Allowed image-image pairs at 256 text states and a 32 x 32 grid, convolution of side 11.
FULL_SIZE_PAIRS = {"dense": 524_800, "row": 33_264, "column": 16_896, "conv": 61_344}
FULL_SIZE_PAIRS_WITHOUT_WRAP = 57_169
TEXT_LEN, GRID = 256, 32
# text_len, grid_height, grid_width, conv_kernel: a single state, grids narrower than the kernel, high and wide ones.
GEOMETRIES = [(1, 1, 1, 1), (5, 3, 3, 5), (16, 8, 8, 11), (7, 3, 8, 5), (2, 9, 2, 7), (4, 7, 1, 3)]


def figure(kind):
    return allowed(
        Mask(kind=kind, text_len=FIGURE_TEXT_LEN, grid_height=FIGURE_GRID, grid_width=FIGURE_GRID, conv_kernel=3)
    )


def full_size(kind, wrap=True):
    return allowed(Mask(kind=kind, text_len=TEXT_LEN, grid_height=GRID, grid_width=GRID, wrap=wrap))


@pytest.mark.parametrize("kind", FIGURE_OFFSETS)
def test_image_part_has_the_offsets_of_figure_11(kind):
    image = figure(kind)[FIGURE_TEXT_LEN:, FIGURE_TEXT_LEN:]
    expected = [[p - q in FIGURE_OFFSETS[kind] for q in range(16)] for p in range(16)]
    assert image.tolist() == expected


@pytest.mark.parametrize("kind", MASKS)
def test_text_is_causal_and_every_image_state_sees_all_text(kind):
    mask = figure(kind)
    assert mask[:FIGURE_TEXT_LEN, :FIGURE_TEXT_LEN].equal(torch.ones(6, 6).tril().bool())
    assert not mask[:FIGURE_TEXT_LEN, FIGURE_TEXT_LEN:].any()
    assert mask[FIGURE_TEXT_LEN:, :FIGURE_TEXT_LEN].all()


@pytest.mark.parametrize("kind", FULL_SIZE_PAIRS)
def test_full_size_counts_are_the_golden_ones(kind):
    mask = full_size(kind)
    assert int(mask[:TEXT_LEN, :TEXT_LEN].sum()) == 32_896
    assert int(mask[TEXT_LEN:, :TEXT_LEN].sum()) == 262_144
    assert int(mask[TEXT_LEN:, TEXT_LEN:].sum()) == FULL_SIZE_PAIRS[kind]


def test_the_last_state_sees_33_row_32_column_and_66_convolution_states():
    """The counts of offsets in the paper's section 3.7: 1 + W, W, and the wrapped 11 x 11 window."""
    seen = {kind: int(full_size(kind)[-1, TEXT_LEN:].sum()) for kind in ("row", "column", "conv")}
    assert seen == {"row": 33, "column": 32, "conv": 66}


def test_conv_offsets_at_full_size_are_windows_around_the_column_with_the_closing_ones():
    row = full_size("conv")[-1, TEXT_LEN:].flip(0)  # index = offset
    windows = {32 * j + across for j in range(6) for across in range(-5, 6)} | set(range(187, 192))
    assert set(row.nonzero().flatten().tolist()) == {offset for offset in windows if offset >= 0}


def test_without_wrap_conv_is_the_plain_raster_window_of_61_offsets():
    mask = full_size("conv", wrap=False)[TEXT_LEN:, TEXT_LEN:]
    assert int(mask.sum()) == FULL_SIZE_PAIRS_WITHOUT_WRAP
    missing = (full_size("conv")[-1, TEXT_LEN:] & ~mask[-1]).flip(0)
    assert missing.nonzero().flatten().tolist() == list(range(187, 192))


def test_column_mask_is_block_diagonal_once_the_grid_is_transposed():
    """Figure 11(c): the form that a GPU runs; its blocks are causal."""
    transposed = torch.arange(16).view(4, 4).T.flatten()
    image = figure("column")[FIGURE_TEXT_LEN:, FIGURE_TEXT_LEN:][transposed][:, transposed]
    p = torch.arange(16)
    assert image.equal((p[:, None] // 4 == p // 4) & (p[:, None] >= p))


@pytest.mark.parametrize("wrap", [True, False], ids=["wrap", "plain"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("text_len", "height", "width", "conv_kernel"), GEOMETRIES)
def test_every_predicate_is_causal_sees_itself_and_equals_the_list_of_keys(
    kind, text_len, height, width, conv_kernel, wrap
):
    spec = Mask(kind=kind, text_len=text_len, grid_height=height, grid_width=width, conv_kernel=conv_kernel, wrap=wrap)
    mask = allowed(spec)
    assert mask.shape == (spec.seq_len, spec.seq_len)
    assert mask.dtype == torch.bool
    assert not mask.triu(1).any()
    assert mask.diagonal().all()
    assert mask.equal(visible(spec))


@pytest.mark.parametrize("kind", MASKS)
def test_full_size_predicates_equal_the_lists_of_keys(kind):
    assert full_size(kind).equal(visible(Mask(kind=kind, text_len=TEXT_LEN, grid_height=GRID, grid_width=GRID)))


def test_a_predicate_answers_for_single_positions_too():
    mask = Mask(kind="row", text_len=6, grid_height=4, grid_width=4)
    query, key = torch.tensor([5, 6, 11, 11, 3]), torch.tensor([0, 6, 6, 5, 4])
    # Text on text, image on itself, image five back (past the row's four), image on text, text on later text.
    assert mask.sees(query, key).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "spiral"}, "mask 'spiral' is unknown; known masks are dense, row, column, conv"),
        ({"text_len": 0}, "text_len 0"),
        ({"grid_height": 0}, "grid_height 0"),
        ({"grid_width": -1}, "grid_width -1"),
        ({"conv_kernel": 4}, "conv_kernel 4 must be odd"),
        ({"conv_kernel": -1}, "conv_kernel -1 must be odd and positive"),
    ],
)
def test_a_bad_mask_names_field_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        Mask(**{"kind": "row", "text_len": 6, "grid_height": 4, "grid_width": 4, **change})
