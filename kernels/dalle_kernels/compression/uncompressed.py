"""The compressor that compresses nothing: matrices averaged by resblock, all else in one 32-bit average."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_kernels.compression.base import (
    BlockOf,
    Gradients,
    Reduction,
    at_least_32_bit,
    check_choice,
    reduce_in_one_call,
    resblock_of,
    split,
)
from dalle_kernels.compression.errors import CodedErrors, ErrorBuffer, FullErrors, zero
from dalle_kernels.compression.wire import WIRES, Group, Traffic, start_average

# Unscaled gradients are kept times this: up to 16,000, where the format's own limit is 16, and down to 2**-57.
UNIT = 2.0**-10
BUFFERS: dict[str, Callable[[Tensor], ErrorBuffer]] = {"full": FullErrors, "1-6-9": partial(CodedErrors, unit=UNIT)}


class NoCompression:
    """`wire` and `buffers` are the formats in which matrices travel and add up; all else does so in full.

    Buffers in 1-6-9 take 2 bytes an entry.
    """

    def __init__(
        self, *, wire: str = "full", scale: float = 1.0, buffers: str = "full", block_of: BlockOf = resblock_of
    ) -> None:
        check_choice("wire", wire, WIRES)
        check_choice("buffers", buffers, BUFFERS)
        self.wire, self.scale, self.block_of = wire, scale, block_of
        self.kind = buffers
        self.traffic = Traffic()
        self.blocks: dict[str, list[str]] = {}
        self._buffers: dict[str, ErrorBuffer] = {}
        self._waiting: dict[str, Callable[[], list[Tensor]]] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def declare(self, like: Gradients) -> None:
        like = {name: tensor for name, tensor in like.items() if name not in self._buffers}
        blocks, whole = split(like, self.block_of)
        self.blocks |= blocks
        for name, tensor in like.items():
            zeros = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            self._buffers[name] = BUFFERS["full" if name in whole else self.kind](zeros)

    @torch.no_grad()
    def add(self, gradients: Gradients) -> None:
        # What is not finite is added too: it shows in the norm.
        for name, gradient in gradients.items():
            values = self._buffers[name].load()
            self._buffers[name].store(values.add_(at_least_32_bit(gradient)))

    def reduce_(self, gradients: Gradients, group: Group) -> Reduction:
        return reduce_in_one_call(self, gradients, group)

    @torch.no_grad()
    def send(self, block: str, group: Group) -> None:
        n_bytes, self._waiting[block] = self._start(self.blocks[block], group, self.wire, self.scale)
        self.traffic.matrix_bytes += n_bytes

    @torch.no_grad()
    def finish(self, group: Group) -> Reduction:
        for block in self.blocks:
            if block not in self._waiting:
                self.send(block, group)
        in_block = {name for names in self.blocks.values() for name in names}
        whole = [name for name in self._buffers if name not in in_block]
        waits = [(self.blocks[block], wait) for block, wait in self._waiting.items()]
        if whole:
            n_bytes, wait = self._start(whole, group)
            waits.append((whole, wait))
            self.traffic.whole_bytes += n_bytes
        squares: dict[str, Tensor] = {}
        for names, wait in waits:
            for name, average in zip(names, wait(), strict=True):
                squares[name] = average.square().sum()
                self._buffers[name].store(average)
        self._waiting = {}
        matrices = tuple(name for block in self.blocks.values() for name in block)
        total = torch.stack(list(squares.values())).sum()
        nonfinite = torch.stack(
            [total.new_zeros((), dtype=torch.bool), *(~squares[name].isfinite() for name in matrices)]
        )
        return Reduction(torch.where(total.isfinite(), total, torch.inf), nonfinite[1:], matrices)

    @torch.no_grad()
    def take(self, names: Iterable[str], out: Gradients | None = None) -> dict[str, Tensor]:
        averages = {}
        for name in names:
            buffer = self._buffers[name]
            values = buffer.load()
            if out is not None:
                averages[name] = out[name].copy_(values)
            else:
                averages[name] = values.clone() if isinstance(buffer, FullErrors) else values
            zero(buffer)
        return averages

    def _start(
        self, names: list[str], group: Group, wire: str = "full", scale: float = 1.0
    ) -> tuple[int, Callable[[], list[Tensor]]]:
        tensors = [self._buffers[name].load() for name in names]
        if dist.get_world_size(group) == 1:
            return 0, lambda: tensors
        self.traffic.n_calls += 1
        return start_average(tensors, group, wire, scale)

    def state_dict(self, group: Group) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"state with {', '.join(state)} is not of a run without compression; name its compressor")
