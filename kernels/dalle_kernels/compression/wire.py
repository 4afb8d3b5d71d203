"""How tensors travel when they are averaged between machines: whole, or in 16 bits (Appendix D, Appendix E.2).

A wire takes one flat tensor, starts its average over a group, and returns what waits for the result. The paper sends
1-6-9 with a reduction of its own; no library reduces that format, so here every rank receives its part of all tensors,
averages it in 32 bits and sends it to all: the bytes of a ring all-reduce, with two roundings however many machines.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_kernels.compression.formats import ERROR_BUFFER, decode, encode

Group = dist.ProcessGroup | None
Finish = Callable[[], Tensor]

# What does not fit becomes infinite, so that it is noticed (Appendix E.2, step 10).
CODED = dataclasses.replace(ERROR_BUFFER, saturates=False)


@dataclass
class Traffic:
    """Bytes handed to collectives so far: in matrices or their factors, in all that is sent whole, and the calls."""

    matrix_bytes: int = 0
    whole_bytes: int = 0
    n_calls: int = 0


def start_average(
    tensors: Sequence[Tensor], group: Group, wire: str = "full", scale: float = 1.0
) -> tuple[int, Callable[[], list[Tensor]]]:
    """Starts one grouped average of tensors of one dtype -> its bytes, and what waits for the averages.

    The tensors are sent times `scale` and come back divided by it, in their own dtype, unchanged if not finite.
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    n_bytes, finish = WIRES[wire](flat if scale == 1.0 else flat.mul_(scale), group)

    def wait() -> list[Tensor]:
        average = finish() if scale == 1.0 else finish().div_(scale)
        parts = torch.split(average, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    return n_bytes, wait


def _send_full(flat: Tensor, group: Group) -> tuple[int, Finish]:
    return _send_cast(flat, group, flat.dtype)


def _send_cast(flat: Tensor, group: Group, dtype: torch.dtype) -> tuple[int, Finish]:
    payload = flat.to(dtype)
    work = dist.all_reduce(payload, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return payload.to(flat.dtype).div_(dist.get_world_size(group))

    return payload.nbytes, finish


def _send_coded(flat: Tensor, group: Group) -> tuple[int, Finish]:
    n = dist.get_world_size(group)
    padded = torch.nn.functional.pad(flat.float(), (0, -len(flat) % n))
    codes = encode(padded, CODED)
    parts = torch.empty_like(codes)
    # As bytes: gloo and NCCL know no uint16.
    work = dist.all_to_all_single(parts.view(torch.uint8), codes.view(torch.uint8), group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        mean = decode(parts, CODED).view(n, -1).mean(0)
        dist.all_gather_into_tensor(codes.view(torch.uint8), encode(mean, CODED).view(torch.uint8), group=group)
        return decode(codes, CODED)[: len(flat)].to(flat.dtype)

    return codes.nbytes, finish


def _send_float16(flat: Tensor, group: Group) -> tuple[int, Finish]:
    return _send_cast(flat, group, torch.float16)


def _send_bfloat16(flat: Tensor, group: Group) -> tuple[int, Finish]:
    return _send_cast(flat, group, torch.bfloat16)


# "full" is at least 32 bits: float32, or float64 where gradients are.
WIRES: dict[str, Callable[[Tensor, Group], tuple[int, Finish]]] = {
    "full": _send_full,
    "float16": _send_float16,
    "bfloat16": _send_bfloat16,
    "1-6-9": _send_coded,
}
