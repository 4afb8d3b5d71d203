"""The attention masks as predicates over positions (paper: Figure 11, section 2.2, Appendix B.1).

The stream is `text_len` text states, then a raster of `grid_size` x `grid_size` image states. In every mask text
states attend causally to text, and image states attend to all text states and to themselves; the masks differ in which
earlier image states an image state sees. A new mask is one predicate and one entry in MASKS.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """A mask and the geometry it is laid over."""

    kind: str
    text_len: int
    grid_size: int
    conv_kernel: int = 11

    def __post_init__(self) -> None:
        if self.kind not in MASKS:
            raise ValueError(f"mask {self.kind!r} is unknown; known masks are {', '.join(MASKS)}")
        if self.text_len < 1 or self.grid_size < 1:
            raise ValueError(f"text_len {self.text_len} and grid_size {self.grid_size} must be at least 1")
        if self.conv_kernel < 1 or self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel {self.conv_kernel} must be odd and positive")

    @property
    def seq_len(self) -> int:
        return self.text_len + self.grid_size**2


def allowed(spec: MaskSpec, device: torch.device | str = "cpu") -> Tensor:
    """The mask as a boolean matrix [seq_len, seq_len]: entry (i, j) says whether state i attends to state j.

    The tensor is shared between calls: do not write to it.
    """
    return _allowed(spec, torch.device(device))


@functools.lru_cache(maxsize=64)
def _allowed(spec: MaskSpec, device: torch.device) -> Tensor:
    position = torch.arange(spec.seq_len, device=device)
    query, key = position[:, None], position[None, :]
    image_query, image_key = query - spec.text_len, key - spec.text_len
    # Raster distance; meaningless (and masked away below) where the key is a text state.
    offset = image_query - image_key
    window = MASKS[spec.kind](offset, spec)
    return (key <= query) & torch.where(key < spec.text_len, True, window)


def dense(offset: Tensor, spec: MaskSpec) -> Tensor:
    """Every earlier image state."""
    return offset >= 0


def row(offset: Tensor, spec: MaskSpec) -> Tensor:
    """The grid_size states before and the state itself, wrapping over row edges: W + 1 offsets."""
    return (offset >= 0) & (offset <= spec.grid_size)


def column(offset: Tensor, spec: MaskSpec) -> Tensor:
    """The states of the same column."""
    return (offset >= 0) & (offset % spec.grid_size == 0)


def conv(offset: Tensor, spec: MaskSpec) -> Tensor:
    """A conv_kernel-wide window around the columns of this row and the rows above, wrapping over row edges.

    The rule reproduces Figure 11(d) cell by cell, its closing offset 2W - 1 included: 66 offsets at W = 32, K = 11.
    """
    reach = spec.conv_kernel // 2
    across = offset % spec.grid_size
    near = torch.minimum(across, spec.grid_size - across) <= reach
    return (offset >= 0) & (offset < (reach + 1) * spec.grid_size) & near


MASKS: dict[str, Callable[[Tensor, MaskSpec], Tensor]] = {"dense": dense, "row": row, "column": column, "conv": conv}
