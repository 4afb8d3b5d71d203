"""Area resizing as TensorFlow 1's ResizeArea does it: each pixel is the mean of the rectangle it stands for.

Pillow's BOX filter takes whole pixels only, without the fractions at a rectangle's edges, and knows no aligned corners.
Listings 1 and 2 ask for both: on photographs BOX is 1.5 to 6 grey levels off on average, and over 100 at single pixels.
Rows and columns are averaged one after the other, each with a sparse matrix.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

Pixels = npt.NDArray[np.uint8]


class Window(NamedTuple):
    """The part of the resized picture that is wanted: its upper left corner, and the side of the square."""

    x: int
    y: int
    side: int


def area_span(n_in: int, n_out: int, first: int, count: int, *, align_corners: bool) -> tuple[int, int]:
    """The pixels [begin, end) of `n_in` that the resized pixels [first, first + count) of `n_out` are means of."""
    step = _step(n_in, n_out, align_corners=align_corners)
    begin, end = int(np.floor(first * step)), int(np.ceil((first + count) * step))
    return min(begin, n_in - 1), min(end, n_in)


def area_resize(
    pixels: Pixels, n_in: tuple[int, int], corner: tuple[int, int], n_out: int, window: Window, *, align_corners: bool
) -> Pixels:
    """A window of a picture resized to n_out x n_out, uint8 [window.side, window.side, 4], rounded half to even.

    The picture has n_in (width, height) pixels; of it, `pixels` [H, W, 4] holds what `area_span` names for the window,
    from `corner` (x, y) on. With `align_corners` resized pixel i covers [i, i + 1) (n - 1) / (n_out - 1) of n pixels,
    the last one repeated beyond the edge; without, [i, i + 1) n / n_out.
    """
    height, width, channels = pixels.shape
    assert channels == 4  # with a spare one a pixel is 16 or 4 bytes: one number to numpy, which turns those quickly
    columns, rows = (
        _means(n, n_out, first, window.side, offset, held, align_corners=align_corners)
        for n, first, offset, held in zip(n_in, window[:2], corner, (width, height), strict=True)
    )
    means = rows @ pixels.reshape(height, -1).astype(np.float32)  # [side, W * 4]
    turned = np.ascontiguousarray(means.view(np.complex128).T).view(np.float32)  # [W, side * 4]
    means = columns @ turned  # [x, y * 4]
    rounded = np.rint(means, out=means).astype(np.uint8)
    return np.ascontiguousarray(rounded.view(np.uint32).T).view(np.uint8).reshape(window.side, window.side, channels)


def _means(
    n_in: int, n_out: int, first: int, count: int, offset: int, held: int, *, align_corners: bool
) -> sparse.csr_array:
    """Matrix [count, held] that averages pixels offset.. of a line; its rows add up to 1."""
    step = _step(n_in, n_out, align_corners=align_corners)
    begin = np.arange(first, first + count)[:, None] * step  # [count, 1]
    pixel = np.floor(begin).astype(np.int64) + np.arange(int(np.ceil(step)) + 1)  # [count, taps]
    overlap = np.minimum(begin + step, pixel + 1) - np.maximum(begin, pixel)
    weight = (np.maximum(overlap, 0) / step).astype(np.float32)
    # The last tap may cover nothing, and lie outside of what is held.
    column = np.clip(np.minimum(pixel, n_in - 1) - offset, 0, held - 1).astype(np.int32)
    ends = np.arange(0, pixel.size + 1, pixel.shape[1], dtype=np.int32)
    return sparse.csr_array((weight.ravel(), column.ravel(), ends), shape=(count, held))


def _step(n_in: int, n_out: int, *, align_corners: bool) -> float:
    """Pixels of the picture for one of the resized picture."""
    return (n_in - 1) / (n_out - 1) if align_corners and n_out > 1 else n_in / n_out
