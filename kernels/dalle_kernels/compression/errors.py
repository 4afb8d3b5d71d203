"""Where gradients are added up between updates, and what is left of them kept: in 1-6-9 as the paper has it, or in full
(Appendix D)."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dalle_kernels.compression.accumulation import Noise, accumulate
from dalle_kernels.compression.formats import CODED, decode, encode

# Unscaled gradients are kept times this: up to 16,000, where the format's own limit is 16, and down to 2**-57. What
# exceeds the limit would be infinite at every update, and no gradient scale could help.
UNIT = 2.0**-10


class ErrorBuffer(Protocol):
    """Same-shaped tensors [n, ...]: loaded to compute with, stored when that is done, whole or one at a time."""

    def load(self, index: int | None = None) -> Tensor:
        """All [n, ...] or one [...], in at least 32 bits. What is done to it in place holds once it is stored."""

    def store(self, values: Tensor, index: int | None = None) -> None: ...

    def add(self, index: int, gradient: Tensor, factor: Tensor, finite: Tensor, noise: Noise | None) -> None:
        """Adds factor * gradient to one, if it is finite; formats of 16 bits round stochastically with `noise`."""

    def zero_(self) -> None:
        """Makes all entries 0, without computing with them."""

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

    def add(self, index: int, gradient: Tensor, factor: Tensor, finite: Tensor, noise: Noise | None) -> None:
        mine = self.values[index]
        if not finite.is_cpu:  # there to ask would be to wait
            mine.addcmul_(torch.where(finite, gradient, 0).to(mine.dtype), factor.to(mine.dtype))
        elif finite:
            mine.add_(gradient, alpha=float(factor))

    def zero_(self) -> None:
        self.values.zero_()

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

    def add(self, index: int, gradient: Tensor, factor: Tensor, finite: Tensor, noise: Noise | None) -> None:
        accumulate(self.codes[index], gradient, factor, finite, CODED, self.unit, noise)

    def zero_(self) -> None:
        self.codes.zero_()

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes


ERROR_BUFFERS: dict[str, Callable[[Tensor], ErrorBuffer]] = {
    "full": FullErrors,
    "1-6-9": partial(CodedErrors, unit=UNIT),
}
