"""What averages gradients between machines: the interface of every compressor.

A compressor sees tensors and a process group, one rank a machine: under ZeRO-3 inside machines, this rank's shards and
the ranks of the same ordinal. It knows no model and no engine. Gradients add up in its own buffers as they come, over
micro-steps too, so that no other memory is needed for them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dalle_kernels.compression.wire import Group, Traffic

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


class Options(Protocol):
    """Settings of a compressor: a frozen dataclass, whose fields a configuration may name."""

    def for_shard(self, n_shards: int, ordinal: int, buffers: str) -> Any:
        """The settings for shard `ordinal` of `n_shards`; `buffers` is how gradients that are not compressed add up.

        Raises ValueError, with what would do, where there cannot be so many shards.
        """


class Compressor(Protocol):
    """Averages gradients over a group. Names, their order and all calls are the same on all ranks of the group."""

    traffic: Traffic
    n_updates: int
    keeps_errors: bool
    """whether an update leaves something to later ones"""

    @property
    def blocks(self) -> Mapping[str, Sequence[str]]:
        """The names of the matrices of each resblock, of what was declared."""

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""

    def declare(self, like: Gradients) -> None:
        """Makes buffers for gradients of these names, shapes and devices: all those of a resblock in one call."""

    def add(self, gradients: Gradients, factor: Tensor | float = 1.0) -> None:
        """Adds gradients times a number, any of the declared ones, into their buffers, in at least float32.

        They may have any floating dtype. What is not finite shows in the norm.
        """

    def send(self, block: str, group: Group) -> None:
        """Starts the average of a resblock to which all has been added; others may still be under way."""

    def finish(self, group: Group) -> Reduction:
        """Sends what `send` has not, and waits for all averages."""

    def take(self, names: Iterable[str], out: Gradients | None = None) -> dict[str, Tensor]:
        """The averages, a resblock's matrices together; the buffers are then as the next update needs them.

        With `out`, they are written into its tensors of these names, which may have other dtypes.
        """

    def reduce_(self, gradients: Gradients, group: Group) -> Reduction:
        """All of it in one call: replaces gradients by their average over the group."""

    def state_dict(self, group: Group, *, keep: bool = True) -> dict[str, Any]:
        """What a run needs to go on, on the CPU: the same on every machine. All ranks of the group call it.

        {"n_updates": ..., "errors": {name: Tensor}}, the latter empty where nothing is left to later updates, and on
        ranks that do not `keep` what others do.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state, of a group of any size, when all gradients are declared."""


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


def wide(like: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where the tensor is that."""
    return torch.promote_types(like.dtype, torch.float32)


def as_factor(factor: Tensor | float, like: Tensor) -> Tensor:
    """A number as a float32 scalar beside the tensor."""
    if isinstance(factor, Tensor):
        return factor.float()
    return torch.full((), factor, dtype=torch.float32, device=like.device)


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{field} {value!r} is unknown; known are {', '.join(choices)}")


@torch.no_grad()
def reduce_in_one_call(compressor: Compressor, gradients: Gradients, group: Group) -> Reduction:
    """Replaces gradients by their average; every call must have the same names."""
    compressor.declare(gradients)
    compressor.add(gradients)
    reduction = compressor.finish(group)
    in_block = {name for names in compressor.blocks.values() for name in names}
    for names in (*compressor.blocks.values(), [name for name in gradients if name not in in_block]):
        compressor.take(names, gradients)
    return reduction
