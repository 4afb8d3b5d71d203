"""Sparse attention over one stream of text states followed by a raster of image states."""

from dalle_kernels.attention.masks import MASKS, MaskSpec, allowed
from dalle_kernels.attention.ops import attention

__all__ = ["MASKS", "MaskSpec", "allowed", "attention"]
