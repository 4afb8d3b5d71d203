"""The compressors by name."""

from collections.abc import Callable, Mapping
from typing import Any

from dalle_kernels.compression.base import Compressor
from dalle_kernels.compression.factors import PowerSGDOptions
from dalle_kernels.compression.powersgd import PowerSGD
from dalle_kernels.compression.uncompressed import NoCompression


def _powersgd(**options: Any) -> Compressor:
    return PowerSGD(PowerSGDOptions(**options))


# Name -> what makes it of its options.
COMPRESSORS: Mapping[str, Callable[..., Compressor]] = {"none": NoCompression, "powersgd": _powersgd}
