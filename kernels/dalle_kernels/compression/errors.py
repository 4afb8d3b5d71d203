"""Where error buffers are kept between updates: in 1-6-9 as the paper has it, or in full (Appendix D)."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from dalle_kernels.compression.formats import decode, encode
from dalle_kernels.compression.wire import CODED


class ErrorBuffer(Protocol):
    """Same-shaped matrices [n, rows, columns]: `load` to compute with, `store` when that is done."""

    def load(self) -> Tensor:
        """In at least 32 bits. What is done to it in place holds once it is stored."""

    def store(self, values: Tensor) -> None: ...


class FullErrors:
    """Kept as they are computed; `load` copies nothing."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def load(self) -> Tensor:
        return self.values

    def store(self, values: Tensor) -> None:
        self.values = values


class CodedErrors:
    """Two bytes an entry. An error that outgrows the format becomes infinite, and so is found and zeroed."""

    def __init__(self, values: Tensor) -> None:
        self.dtype = values.dtype
        self.store(values)

    def load(self) -> Tensor:
        return decode(self.codes, CODED).to(self.dtype)

    def store(self, values: Tensor) -> None:
        self.codes = encode(values.float(), CODED)


ERROR_BUFFERS: dict[str, Callable[[Tensor], ErrorBuffer]] = {"full": FullErrors, "1-6-9": CodedErrors}
