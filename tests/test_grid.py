"""Picture grids: where the pictures land, how captions wrap, what is refused."""

import numpy as np
import pytest
from PIL import ImageFont

from dalle_ds.reporting import grid
from dalle_ds.reporting.grid import GAP, MAX_LINES, make_grid, pairs_grid, wrap


def flat(colour, side=32):
    return np.full((side, side, 3), colour, dtype=np.uint8)


RED, BLUE, GREEN = (200, 0, 0), (0, 0, 200), (0, 160, 0)


def test_without_captions_the_pictures_stand_row_by_row_with_gaps():
    picture = make_grid([flat(RED), flat(BLUE), flat(GREEN)], [], columns=2)
    assert picture.size == (2 * 32 + 3 * GAP, 2 * 32 + 3 * GAP)
    assert picture.getpixel((GAP, GAP)) == RED
    assert picture.getpixel((2 * GAP + 32, GAP)) == BLUE
    assert picture.getpixel((GAP, 2 * GAP + 32)) == GREEN
    assert picture.getpixel((2 * GAP + 32, 2 * GAP + 32)) == grid.PAPER


def test_scale_enlarges_every_picture():
    picture = make_grid([flat(RED)], [], columns=4, scale=3)
    assert picture.size == (96 + 2 * GAP, 96 + 2 * GAP)
    assert picture.getpixel((GAP + 95, GAP + 95)) == RED


def test_a_caption_is_drawn_under_its_picture_and_nowhere_over_it():
    picture = np.asarray(make_grid([flat(RED, 128)], ["a red square"], columns=1))
    assert (picture[GAP : GAP + 128, GAP : GAP + 128] == RED).all()
    assert (picture[GAP + 128 :] < 128).any()


def test_a_longer_caption_makes_its_row_taller():
    short = make_grid([flat(RED)] * 2, ["red", "red"], columns=2)
    long = make_grid([flat(RED)] * 2, ["red", "a red square above a large yellow circle on stripes"], columns=2)
    assert long.height > short.height


def test_wrapped_lines_fit_and_hold_every_word():
    font = ImageFont.load_default(size=grid.FONT_SIZE)
    caption = "a  large red circle\nabove a small blue diamond"
    lines = wrap(caption, 130, font)
    assert " ".join(lines).split() == caption.split()
    assert all(font.getlength(line) <= 130 for line in lines)


def test_a_word_longer_than_the_line_is_broken_and_a_long_text_ends_in_an_ellipsis():
    font = ImageFont.load_default(size=grid.FONT_SIZE)
    pieces = wrap("x" * 40, 130, font)
    assert "".join(pieces) == "x" * 40
    lines = wrap("red " * 200, 130, font)
    assert len(lines) == MAX_LINES
    assert lines[-1].endswith("...")
    assert all(font.getlength(line) <= 130 for line in lines)


def test_an_empty_caption_takes_no_line():
    assert wrap("  ", 100, ImageFont.load_default(size=grid.FONT_SIZE)) == []


def test_pairs_stand_with_the_reconstruction_right_below_the_original():
    picture = np.asarray(pairs_grid([flat(RED, 64)] * 3, [flat(BLUE, 64)] * 3, columns=2))
    column = picture[:, picture.shape[1] - GAP // 2 - 64 - GAP // 2 - 10]
    runs = [tuple(int(value) for value in colour) for colour in column if tuple(colour) != grid.PAPER]
    assert runs == [RED] * 64 + [BLUE] * 64 + [RED] * 64 + [BLUE] * 64


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        ([], [], "at least one picture"),
        ([flat(RED)], ["a", "b"], "2 captions for 1 pictures"),
        ([flat(RED)[..., 0]], [], r"picture 0 is uint8 \[32, 32\]"),
        ([flat(RED).astype(np.float32)], [], "picture 0 is float32"),
    ],
)
def test_what_is_no_grid_is_refused(images, captions, message):
    with pytest.raises(ValueError, match=message):
        make_grid(images, captions)


def test_as_many_originals_as_reconstructions_are_needed():
    with pytest.raises(ValueError, match="2 originals, 1 reconstructions"):
        pairs_grid([flat(RED)] * 2, [flat(BLUE)])
