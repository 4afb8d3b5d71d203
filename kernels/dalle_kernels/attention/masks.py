"""The attention masks as predicates over positions (paper: Figure 11, section 2.2, Appendix B.1).

The stream is `text_len` text states, then a raster of `grid_height` x `grid_width` image states. In every mask text
states attend causally to text, and image states attend to all text states and to themselves; the masks differ in which
earlier image states an image state sees. A new mask is one predicate and one entry in MASKS.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A mask and the geometry it is laid over; hashable, so that what is derived from it can be kept.

    `conv_kernel` and `wrap` are read by the convolutional mask alone: with `wrap` it closes its last window on the
    far side of the row edge, as Figure 11(d) does (66 offsets at width 32 and side 11); without, it is the plain causal
    window in raster order (61).
    """

    kind: str
    text_len: int
    grid_height: int
    grid_width: int
    conv_kernel: int = 11
    wrap: bool = True

    def __post_init__(self) -> None:
        if self.kind not in MASKS:
            raise ValueError(f"mask {self.kind!r} is unknown; known masks are {', '.join(MASKS)}")
        for name in ("text_len", "grid_height", "grid_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.conv_kernel < 1 or self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel {self.conv_kernel} must be odd and positive")

    @property
    def image_len(self) -> int:
        return self.grid_height * self.grid_width

    @property
    def seq_len(self) -> int:
        return self.text_len + self.image_len

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether the state at position `query` of the stream attends to the one at `key`; integers that broadcast."""
        # Where the key is a text state the raster position is meaningless, and what the predicate says is not read.
        window = MASKS[self.kind](query - self.text_len, key - self.text_len, self)
        return (key <= query) & ((key < self.text_len) | window)


def allowed(mask: Mask, device: torch.device | str = "cpu") -> Tensor:
    """The mask as a boolean matrix [seq_len, seq_len]: entry (i, j) says whether state i attends to state j.

    The tensor is shared between calls: do not write to it.
    """
    return _allowed(mask, torch.device(device))


@functools.lru_cache(maxsize=64)
def _allowed(mask: Mask, device: torch.device) -> Tensor:
    position = torch.arange(mask.seq_len, device=device)
    return mask.sees(position[:, None], position[None, :])


def dense(query: Tensor, key: Tensor, mask: Mask) -> Tensor:
    """Every earlier image state."""
    return query >= key


def row(query: Tensor, key: Tensor, mask: Mask) -> Tensor:
    """The grid_width states before and the state itself, wrapping over row edges: W + 1 offsets."""
    return (query >= key) & (query - key <= mask.grid_width)


def column(query: Tensor, key: Tensor, mask: Mask) -> Tensor:
    """The states of the same column."""
    return (query >= key) & ((query - key) % mask.grid_width == 0)


def conv(query: Tensor, key: Tensor, mask: Mask) -> Tensor:
    """A conv_kernel-wide window around the columns of this row and the rows above, wrapping over row edges.

    With `wrap` the rule reproduces Figure 11(d) cell by cell, its closing offset 2W - 1 included.
    """
    reach, width = mask.conv_kernel // 2, mask.grid_width
    offset = query - key
    across = offset % width
    near = torch.minimum(across, width - across) <= reach
    return (offset >= 0) & (offset <= conv_span(mask)) & near


def conv_span(mask: Mask) -> int:
    """The largest raster offset of the convolutional mask."""
    reach = mask.conv_kernel // 2
    return (reach + 1) * mask.grid_width - 1 if mask.wrap else reach * mask.grid_width + reach


# Kind -> predicate over raster positions (query, key) of image states, elementwise; it answers for key <= query.
MASKS: dict[str, Callable[[Tensor, Tensor, Mask], Tensor]] = {
    "dense": dense,
    "row": row,
    "column": column,
    "conv": conv,
}
