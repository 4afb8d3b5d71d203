"""Where gradients are added up between updates, and what is left of them kept: in 1-6-9 as the paper has it, or in full
(Appendix D)."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from dalle_kernels.compression.formats import decode, encode
from dalle_kernels.compression.wire import CODED


class ErrorBuffer(Protocol):
    """Same-shaped tensors [n, ...]: loaded to compute with, stored when that is done, whole or one at a time."""

    def load(self, index: int | None = None) -> Tensor:
        """All [n, ...] or one [...], in at least 32 bits. What is done to it in place holds once it is stored."""

    def store(self, values: Tensor, index: int | None = None) -> None: ...

    @property
    def nbytes(self) -> int: ...


class FullErrors:
    """Kept as they are computed; `load` copies nothing."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def load(self, index: int | None = None) -> Tensor:
        return self.values if index is None else self.values[index]

    def store(self, values: Tensor, index: int | None = None) -> None:
        mine = self.load(index)
        if values.data_ptr() != mine.data_ptr():
            mine.copy_(values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


class CodedErrors:
    """Two bytes an entry. An error that outgrows the format becomes infinite, and so is found and zeroed.

    Entries are kept times `unit`, a power of two, which shifts the format's range.
    """

    def __init__(self, values: Tensor, unit: float = 1.0) -> None:
        self.dtype, self.unit = values.dtype, unit
        self.codes = encode(values.float() * unit, CODED)

    def load(self, index: int | None = None) -> Tensor:
        codes = self.codes if index is None else self.codes[index]
        return decode(codes, CODED, scale=1 / self.unit).to(self.dtype)

    def store(self, values: Tensor, index: int | None = None) -> None:
        codes = self.codes if index is None else self.codes[index]
        values = values.float()
        encode(values if self.unit == 1 else values * self.unit, CODED, out=codes)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes


def zero(buffer: ErrorBuffer) -> None:
    """Makes all entries 0, without computing with them."""
    (buffer.codes if isinstance(buffer, CodedErrors) else buffer.load()).zero_()


ERROR_BUFFERS: dict[str, Callable[[Tensor], ErrorBuffer]] = {"full": FullErrors, "1-6-9": CodedErrors}
