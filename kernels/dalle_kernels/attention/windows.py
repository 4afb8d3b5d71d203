"""Where the image keys of an image state lie: in which order of the grid, and how far back.

Text keys are the same for every mask; what differs is a short window of image keys, contiguous once the grid is read
in the right order: by rows for row and convolution, by columns for column (Figure 11(c)). A mask without an entry here
runs all the same, with the whole image for a window.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dalle_kernels.attention.masks import Mask, conv_span


@dataclass(frozen=True, kw_only=True)
class Window:
    """Image states see at most the `reach` image states before them, in raster order or in that of the columns."""

    reach: int
    by_columns: bool = False


def find_window(mask: Mask) -> Window:
    """The window of a mask, at most as long as the image."""
    window = WINDOWS[mask.kind](mask) if mask.kind in WINDOWS else Window(reach=mask.image_len)
    return Window(reach=min(window.reach, mask.image_len - 1), by_columns=window.by_columns)


def to_window_order(image: Tensor, mask: Mask) -> Tensor:
    """Image states [B, H, image_len, D] from raster order to that of the window; a view where it can be."""
    if not find_window(mask).by_columns:
        return image
    return _transpose(image, mask.grid_height, mask.grid_width)


def to_raster_order(image: Tensor, mask: Mask) -> Tensor:
    """The inverse of `to_window_order`."""
    if not find_window(mask).by_columns:
        return image
    return _transpose(image, mask.grid_width, mask.grid_height)


def _transpose(image: Tensor, height: int, width: int) -> Tensor:
    B, H, _, D = image.shape
    return image.reshape(B, H, height, width, D).transpose(2, 3).flatten(2, 3)


WINDOWS: dict[str, Callable[[Mask], Window]] = {
    "row": lambda mask: Window(reach=mask.grid_width),
    "column": lambda mask: Window(reach=mask.grid_height - 1, by_columns=True),
    "conv": lambda mask: Window(reach=conv_span(mask)),
}
