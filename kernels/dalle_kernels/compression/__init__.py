"""What training keeps and sends in fewer bytes: PowerSGD between machines, and floats of 16 bits of our own."""

from dalle_kernels.compression.base import Compressor, Options, Reduction
from dalle_kernels.compression.compressors import COMPRESSORS
from dalle_kernels.compression.factors import PowerSGDOptions, n_factor_entries
from dalle_kernels.compression.powersgd import PowerSGD
from dalle_kernels.compression.uncompressed import NoCompression, NoCompressionOptions

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "NoCompression",
    "NoCompressionOptions",
    "Options",
    "PowerSGD",
    "PowerSGDOptions",
    "Reduction",
    "n_factor_entries",
]
