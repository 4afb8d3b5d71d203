"""The compressors by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dalle_kernels.compression.base import Compressor, Options
from dalle_kernels.compression.factors import PowerSGDOptions
from dalle_kernels.compression.powersgd import PowerSGD
from dalle_kernels.compression.uncompressed import NoCompression, NoCompressionOptions


@dataclass(frozen=True)
class Kind:
    """A dataclass of settings, and what makes a compressor of them."""

    options: type[Options]
    make: Callable[[Any], Compressor]


COMPRESSORS: Mapping[str, Kind] = {
    "none": Kind(NoCompressionOptions, NoCompression),
    "powersgd": Kind(PowerSGDOptions, PowerSGD),
}
