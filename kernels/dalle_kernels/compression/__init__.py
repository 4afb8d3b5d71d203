"""Compression: custom 16-bit floats for what training keeps and sends."""

from dalle_kernels.compression.base import Compressor, Reduction
from dalle_kernels.compression.compressors import COMPRESSORS
from dalle_kernels.compression.factors import PowerSGDOptions, n_factor_entries
from dalle_kernels.compression.powersgd import PowerSGD
from dalle_kernels.compression.uncompressed import NoCompression

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "NoCompression",
    "PowerSGD",
    "PowerSGDOptions",
    "Reduction",
    "n_factor_entries",
]
