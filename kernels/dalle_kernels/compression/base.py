"""What averages gradients between machines: the interface of every compressor, and the one that compresses nothing.

A compressor sees tensors and a process group, one rank a machine: under ZeRO-3 inside machines, this rank's shards and
the ranks of the same ordinal. It knows no model and no engine.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dalle_kernels.compression.wire import WIRES, Group, Traffic, start_average

Gradients = Mapping[str, Tensor]
# Name and gradient -> the resblock of a matrix to compress; None for all that is sent whole, in 32 bits.
BlockOf = Callable[[str, Tensor], str | None]


@dataclass(frozen=True)
class Reduction:
    """What one update knows of its averaged gradients, the same on every machine, left on the device.

    `squared_norm` is that of this shard's averaged gradients, and infinite where anything on any machine was not
    finite: then parameters and moments must stay as they are (Appendix E.2, steps 10 and 11). `nonfinite` says so by
    matrix, for the matrices that `names` lists.
    """

    squared_norm: Tensor  # []
    nonfinite: Tensor  # [len(names)], bool
    names: tuple[str, ...]


class Compressor(Protocol):
    """Averages gradients over a group in place."""

    traffic: Traffic

    def reduce_(self, gradients: Gradients, group: Group) -> Reduction:
        """Replaces gradients by their average over the group. Names and their order are the same on all ranks."""

    def state_dict(self, group: Group) -> dict[str, Any]:
        """What a run needs to go on, on the CPU: the same on every machine. All ranks of the group call it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state, of a group of any size."""


def resblock_of(name: str, gradient: Tensor) -> str | None:
    """The resblock of a matrix by its name: "layers.3.mlp" for "layers.3.mlp.up.weight".

    Embeddings and unembeddings belong to no numbered layer, and gains and biases are no matrices: None.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if gradient.ndim != 2 or not numbers:
        return None
    return ".".join(parts[: numbers[0] + 2])


def split(gradients: Gradients, block_of: BlockOf) -> tuple[dict[str, list[str]], list[str]]:
    """Names of matrices by resblock, last resblock first as a backward pass finishes them; and all other names."""
    blocks: dict[str, list[str]] = {}
    whole = []
    for name, gradient in gradients.items():
        block = block_of(name, gradient)
        if block is None:
            whole.append(name)
        else:
            blocks.setdefault(block, []).append(name)
    return dict(reversed(blocks.items())), whole


def at_least_32_bit(tensor: Tensor) -> Tensor:
    """The tensor in float32, or float64 where it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{field} {value!r} is unknown; known are {', '.join(choices)}")


class NoCompression:
    """Matrices averaged by resblock in the format of `wire`, all else in one 32-bit average."""

    def __init__(self, *, wire: str = "full", scale: float = 1.0, block_of: BlockOf = resblock_of) -> None:
        check_choice("wire", wire, WIRES)
        self.wire, self.scale, self.block_of = wire, scale, block_of
        self.traffic = Traffic()

    @torch.no_grad()
    def reduce_(self, gradients: Gradients, group: Group) -> Reduction:
        blocks, whole = split(gradients, self.block_of)
        waits = []
        for names in blocks.values():
            tensors = [at_least_32_bit(gradients[name]) for name in names]
            n_bytes, wait = start_average(tensors, group, self.wire, self.scale)
            waits.append((names, wait))
            self.traffic.matrix_bytes += n_bytes
            self.traffic.n_calls += 1
        if whole:
            n_bytes, wait = start_average([at_least_32_bit(gradients[name]) for name in whole], group)
            waits.append((whole, wait))
            self.traffic.whole_bytes += n_bytes
            self.traffic.n_calls += 1
        squares: dict[str, Tensor] = {}
        for names, wait in waits:
            for name, average in zip(names, wait(), strict=True):
                squares[name] = average.square().sum()
                gradients[name].copy_(average)
        return _reduction(squares, blocks)

    def state_dict(self, group: Group) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"state with {', '.join(state)} is not of a run without compression; name its compressor")


def _reduction(squares: Mapping[str, Tensor], blocks: Mapping[str, list[str]]) -> Reduction:
    names = tuple(name for block in blocks.values() for name in block)
    total = torch.stack(list(squares.values())).sum()
    nonfinite = torch.stack([~squares[name].isfinite() for name in names]) if names else total.new_zeros(0).bool()
    return Reduction(torch.where(total.isfinite(), total, torch.inf), nonfinite, names)
