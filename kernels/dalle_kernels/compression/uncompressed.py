"""The compressor that compresses nothing: matrices averaged by resblock, all else in one 32-bit average."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_kernels.compression.accumulation import noise_of
from dalle_kernels.compression.base import (
    BlockOf,
    Gradients,
    Reduction,
    as_factor,
    check_choice,
    reduce_in_one_call,
    resblock_of,
    split,
    wide,
)
from dalle_kernels.compression.errors import ERROR_BUFFERS, ErrorBuffer
from dalle_kernels.compression.wire import WIRES, Average, Group, Traffic


@dataclass(frozen=True, kw_only=True)
class NoCompressionOptions:
    """`wire` and `buffers` are the formats in which matrices travel, times `scale`, and add up; all else is in full."""

    wire: str = "full"
    scale: float = 1.0
    buffers: str = "full"

    def __post_init__(self) -> None:
        check_choice("wire", self.wire, WIRES)
        check_choice("buffers", self.buffers, ERROR_BUFFERS)
        if self.scale <= 0:
            raise ValueError(f"scale {self.scale} must be above 0")

    def for_shard(self, n_shards: int, ordinal: int, buffers: str) -> "NoCompressionOptions":
        return replace(self, buffers=buffers)


class NoCompression:
    """Buffers in 1-6-9 take 2 bytes an entry, those in full 4."""

    keeps_errors = False

    def __init__(self, options: NoCompressionOptions | None = None, *, block_of: BlockOf = resblock_of) -> None:
        self.options, self.block_of = options or NoCompressionOptions(), block_of
        self.traffic = Traffic()
        self.n_updates = 0
        self.blocks: dict[str, list[str]] = {}
        self._buffers: dict[str, ErrorBuffer] = {}  # of one tensor each
        self._n_added: Counter[str] = Counter()
        self._sent: set[str] = set()
        self._under_way: tuple[list[str], Average] | None = None
        self._squares: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def declare(self, like: Gradients) -> None:
        like = {name: tensor for name, tensor in like.items() if name not in self._buffers}
        blocks, whole = split(like, self.block_of)
        self.blocks |= blocks
        for name, tensor in like.items():
            zeros = torch.zeros((1, *tensor.shape), dtype=wide(tensor), device=tensor.device)
            self._buffers[name] = ERROR_BUFFERS["full" if name in whole else self.options.buffers](zeros)

    @torch.no_grad()
    def add(self, gradients: Gradients, factor: Tensor | float = 1.0) -> None:
        if self._under_way is not None:
            self._under_way[1].advance()
        for name, gradient in gradients.items():
            scalar = as_factor(factor, gradient)
            noise = noise_of(name, self.n_updates, self._n_added[name])
            # What is not finite is added too: it shows in the norm.
            self._buffers[name].add(0, gradient, scalar, torch.ones_like(scalar, dtype=torch.bool), noise)
            self._n_added[name] += 1

    def reduce_(self, gradients: Gradients, group: Group) -> Reduction:
        return reduce_in_one_call(self, gradients, group)

    @torch.no_grad()
    def send(self, block: str, group: Group) -> None:
        self._sent.add(block)
        self.traffic.matrix_bytes += self._send(self.blocks[block], group, self.options.wire, self.options.scale)

    @torch.no_grad()
    def finish(self, group: Group) -> Reduction:
        for block in self.blocks:
            if block not in self._sent:
                self.send(block, group)
        matrices = tuple(name for names in self.blocks.values() for name in names)
        whole = [name for name in self._buffers if name not in set(matrices)]
        if whole:
            self.traffic.whole_bytes += self._send(whole, group)
        self._arrive()
        squares, self._squares, self._sent = self._squares, {}, set()
        self.n_updates += 1
        self._n_added.clear()
        total = torch.stack(list(squares.values())).sum()
        nonfinite = torch.stack(
            [total.new_zeros((), dtype=torch.bool), *(~squares[name].isfinite() for name in matrices)]
        )
        return Reduction(torch.where(total.isfinite(), total, torch.inf), nonfinite[1:], matrices)

    @torch.no_grad()
    def take(self, names: Iterable[str], out: Gradients | None = None) -> dict[str, Tensor]:
        averages = {}
        for name in names:
            values = self._buffers[name].load(0)
            averages[name] = values.clone() if out is None else out[name].copy_(values)
            self._buffers[name].zero_()
        return averages

    def _send(self, names: list[str], group: Group, wire: str = "full", scale: float = 1.0) -> int:
        """Starts an average, and keeps the one that was started before; returns the bytes that are sent.

        So what buffers of 16 bits load in 32 is never that of more than two resblocks.
        """
        if dist.get_world_size(group) == 1:
            for name in names:
                self._squares[name] = self._buffers[name].load(0).square().sum()
            return 0
        average = Average([self._buffers[name].load(0) for name in names], group, wire, scale)
        self.traffic.n_calls += 1
        self._arrive()
        self._under_way = names, average
        return average.n_bytes

    def _arrive(self) -> None:
        """Waits for the average that is under way, if one is, and puts it into its buffers."""
        if self._under_way is None:
            return
        names, average = self._under_way
        for name, mean in zip(names, average.wait(), strict=True):
            self._squares[name] = mean.square().sum()
            self._buffers[name].store(mean, 0)
        self._under_way = None

    def state_dict(self, group: Group, *, keep: bool = True) -> dict[str, Any]:
        return {"n_updates": self.n_updates, "errors": {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Errors of a run with compression, which this one could not make up for, are refused."""
        if state["errors"]:
            raise ValueError(f"errors of {', '.join(state['errors'])} are not of a run without compression")
        self.n_updates = state["n_updates"]
