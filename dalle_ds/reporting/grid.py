"""Pictures side by side, with their captions wrapped underneath: what `sample`, training and the report show.

Pure Pillow, with its built-in font, so that a grid looks the same on every machine.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Picture: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"  # [H, W, 3]
Colour: TypeAlias = tuple[int, int, int]
Font: TypeAlias = ImageFont.ImageFont | ImageFont.FreeTypeFont

PAPER: Colour = (255, 255, 255)
INK: Colour = (40, 40, 46)
FAINT: Colour = (128, 128, 138)

GAP = 14  # pixels between cells, and around all
FONT_SIZE = 15
LINE_HEIGHT = 19
CAPTION_GAP = 6
MAX_LINES = 5
MIN_CAPTION_WIDTH = 120  # a caption under a thumbnail still needs room for two or three words


def make_grid(images: Sequence[Picture], captions: Sequence[str], columns: int = 4, scale: int = 1) -> Image.Image:
    """The pictures row by row, each enlarged `scale` times with its caption beneath, as one RGB picture.

    `images` are uint8 [H, W, 3]; `captions` has one entry a picture, or none at all. A caption of more than
    five lines ends in an ellipsis. Raises ValueError for no pictures, other shapes, or a caption too few.
    """
    _check(images, columns, scale)
    if captions and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} pictures: give one a picture, or none")
    columns = min(columns, len(images))
    width, height = _cell_size(images, scale)
    cell_width = max(width, MIN_CAPTION_WIDTH) if captions else width
    font = ImageFont.load_default(size=FONT_SIZE)
    texts = [wrap(caption, cell_width, font) for caption in captions] or [[] for _ in images]

    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    row_lines = [max(len(texts[i]) for i in row) for row in rows]
    row_heights = [height + (CAPTION_GAP + LINE_HEIGHT * lines if lines else 0) for lines in row_lines]
    canvas = Image.new(
        "RGB", (GAP + columns * (cell_width + GAP), GAP + sum(row_height + GAP for row_height in row_heights)), PAPER
    )
    draw = ImageDraw.Draw(canvas)
    top = GAP
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            left = GAP + column * (cell_width + GAP)
            canvas.paste(enlarge(images[i], scale), (left + (cell_width - width) // 2, top))
            for line, text in enumerate(texts[i]):
                middle = (left + cell_width / 2, top + height + CAPTION_GAP + line * LINE_HEIGHT)
                draw.text(middle, text, fill=INK, font=font, anchor="ma")
        top += row_height + GAP
    return canvas


def pairs_grid(
    originals: Sequence[Picture], reconstructions: Sequence[Picture], columns: int = 8, scale: int = 1
) -> Image.Image:
    """Each original with its reconstruction right below it; rows are named at the left edge.

    Both are uint8 [H, W, 3], as many of the one as of the other. Raises ValueError otherwise.
    """
    _check(originals, columns, scale)
    _check(reconstructions, columns, scale)
    if len(originals) != len(reconstructions):
        raise ValueError(f"{len(originals)} originals, {len(reconstructions)} reconstructions: give as many of each")
    columns = min(columns, len(originals))
    width, height = _cell_size([*originals, *reconstructions], scale)
    pair_gap = GAP // 4
    n_row = -(-len(originals) // columns)
    margin = GAP + LINE_HEIGHT
    pair_height = 2 * height + pair_gap
    canvas = Image.new(
        "RGB", (margin + columns * (width + GAP // 2) + GAP // 2, GAP + n_row * (pair_height + GAP)), PAPER
    )
    for row in range(n_row):
        top = GAP + row * (pair_height + GAP)
        _name_row(canvas, "original", top, height)
        _name_row(canvas, "rebuilt", top + height + pair_gap, height)
    for i, (original, reconstruction) in enumerate(zip(originals, reconstructions, strict=True)):
        row, column = divmod(i, columns)
        left, top = margin + column * (width + GAP // 2), GAP + row * (pair_height + GAP)
        canvas.paste(enlarge(original, scale), (left, top))
        canvas.paste(enlarge(reconstruction, scale), (left, top + height + pair_gap))
    return canvas


def enlarge(image: Picture, scale: int) -> Image.Image:
    """The picture `scale` times as large, smoothly."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if scale == 1:
        return picture
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)


def wrap(caption: str, width: int, font: Font) -> list[str]:
    """`caption` in lines of at most `width` pixels: broken at spaces, and inside a word longer than a line."""
    lines, line = [], ""
    for word in caption.split():
        joined = f"{line} {word}".lstrip()
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        *whole, line = _break_word(word, width, font)
        lines.extend(whole)
    lines.extend([line] if line else [])
    if len(lines) <= MAX_LINES:
        return lines
    last = lines[MAX_LINES - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: MAX_LINES - 1], last.rstrip() + "..."]


def _break_word(word: str, width: int, font: Font) -> list[str]:
    pieces, piece = [], word[0]
    for letter in word[1:]:
        if font.getlength(piece + letter) > width:
            pieces.append(piece)
            piece = letter
        else:
            piece += letter
    return [*pieces, piece]


def _name_row(canvas: Image.Image, name: str, top: int, height: int) -> None:
    """Writes `name` upwards along the left edge, beside the row of `height` pixels; small rows go without."""
    font = ImageFont.load_default(size=FONT_SIZE - 2)
    if font.getlength(name) > height:
        return
    label = Image.new("RGB", (height, LINE_HEIGHT), PAPER)
    ImageDraw.Draw(label).text((height / 2, LINE_HEIGHT / 2), name, fill=FAINT, font=font, anchor="mm")
    canvas.paste(label.transpose(Image.Transpose.ROTATE_90), (GAP // 2, top))


def _cell_size(images: Sequence[Picture], scale: int) -> tuple[int, int]:
    return max(image.shape[1] for image in images) * scale, max(image.shape[0] for image in images) * scale


def _check(images: Sequence[Picture], columns: int, scale: int) -> None:
    if not images:
        raise ValueError("a grid needs at least one picture")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns {columns} and scale {scale} must be at least 1")
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"picture {i} is {image.dtype} {list(image.shape)}, not uint8 [H, W, 3]")
