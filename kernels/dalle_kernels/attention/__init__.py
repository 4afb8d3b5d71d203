"""Sparse attention over one stream of text states followed by a raster of image states."""

from dalle_kernels.attention.cached import cached_attention
from dalle_kernels.attention.masks import MASKS, Mask, allowed
from dalle_kernels.attention.ops import attention

__all__ = ["MASKS", "Mask", "allowed", "attention", "cached_attention"]
