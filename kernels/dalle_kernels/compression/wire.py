"""How tensors travel when they are averaged between machines: whole, or in 16 bits (Appendix D, Appendix E.2).

The paper sends 1-6-9 with a reduction of its own; no library reduces that format, so here every rank receives its part
of all tensors, averages it in 32 bits and sends it to all: the bytes of a ring all-reduce, with two roundings however
many machines. So that such an average has two halves, of which `advance` starts the second.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_kernels.compression.formats import CODED, decode, encode

Group = dist.ProcessGroup | None


@dataclass
class Traffic:
    """Bytes of what was averaged so far, as it is sent: matrices or their factors, and all else; and the averages."""

    matrix_bytes: int = 0
    whole_bytes: int = 0
    n_calls: int = 0


class Average:
    """An average of tensors of one dtype over a group, under way from its making on; `n_bytes` are sent for it.

    The tensors are sent times `scale` and come back divided by it, in their own dtype, unchanged if not finite.
    """

    def __init__(self, tensors: Sequence[Tensor], group: Group, wire: str = "full", scale: float = 1.0) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._shapes, self._scale = [tensor.shape for tensor in tensors], scale
        self._sending = WIRES[wire](flat if scale == 1.0 else flat.mul_(scale), group)
        self.n_bytes = self._sending.n_bytes

    def advance(self) -> None:
        """Starts what is still to be sent when the first part has arrived; every rank at the same point."""
        self._sending.advance()

    def wait(self) -> list[Tensor]:
        """The averages, of the tensors' shapes."""
        average = self._sending.wait()
        parts = torch.split(
            average if self._scale == 1.0 else average.div_(self._scale), [s.numel() for s in self._shapes]
        )
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class Sending(Protocol):
    """A flat tensor on its way."""

    n_bytes: int

    def advance(self) -> None: ...
    def wait(self) -> Tensor: ...


class _Summed:
    """By the backend's all-reduce, in a dtype that it knows: that of the tensor where None is named."""

    def __init__(self, flat: Tensor, group: Group, dtype: torch.dtype | None = None) -> None:
        self._payload, self._dtype, self._n = flat.to(dtype or flat.dtype), flat.dtype, dist.get_world_size(group)
        self._work: Any = dist.all_reduce(self._payload, group=group, async_op=True)
        self.n_bytes = self._payload.nbytes

    def advance(self) -> None:
        """It has one part."""

    def wait(self) -> Tensor:
        self._work.wait()
        return self._payload.to(self._dtype).div_(self._n)


class _Coded:
    """In 1-6-9."""

    def __init__(self, flat: Tensor, group: Group) -> None:
        self._group, self._n = group, dist.get_world_size(group)
        self._length, self._dtype = len(flat), flat.dtype
        missing = -len(flat) % self._n
        padded = torch.nn.functional.pad(flat.float(), (0, missing)) if missing else flat.float()
        self._codes = encode(padded, CODED)
        self._parts = torch.empty_like(self._codes)
        # As bytes: gloo and NCCL know no uint16.
        self._work: Any = dist.all_to_all_single(_bytes(self._parts), _bytes(self._codes), group=group, async_op=True)
        self._is_second = False
        self.n_bytes = self._codes.nbytes

    def advance(self) -> None:
        if self._is_second:
            return
        self._is_second = True
        self._work.wait()
        self._mean = encode(decode(self._parts, CODED).view(self._n, -1).mean(0), CODED)
        self._work = dist.all_gather_into_tensor(
            _bytes(self._codes), _bytes(self._mean), group=self._group, async_op=True
        )

    def wait(self) -> Tensor:
        self.advance()
        self._work.wait()
        return decode(self._codes, CODED)[: self._length].to(self._dtype)


def _bytes(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def largest(wire: str, dtype: torch.dtype) -> float:
    """The largest finite number that travels of tensors of that dtype."""
    return {"1-6-9": CODED.largest, "full": torch.finfo(dtype).max}.get(wire) or torch.finfo(getattr(torch, wire)).max


# "full" is at least 32 bits: float32, or float64 where gradients are.
WIRES: dict[str, Callable[[Tensor, Group], Sending]] = {
    "full": _Summed,
    "float16": partial(_Summed, dtype=torch.float16),
    "bfloat16": partial(_Summed, dtype=torch.bfloat16),
    "1-6-9": _Coded,
}
