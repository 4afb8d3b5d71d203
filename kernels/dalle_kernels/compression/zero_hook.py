"""The seam between DeepSpeed's ZeRO-3 and what averages gradients between machines (Section 2.5, Appendix E.1).

Parameters are sharded over the ranks of a machine, and every machine holds all of them: gradients are summed inside a
machine by a reduce-scatter, and each shard is then averaged with those of the same ordinal on the other machines. Of
DeepSpeed only the names that ZeRO-3 gives to parameters are known here: `ds_shape`, `ds_tensor`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_kernels.compression.wire import Group


@dataclass(frozen=True)
class Machines:
    """How ranks lie on machines: rank r is shard r mod size of machine r // size."""

    size: int
    n: int
    ordinal: int
    """which shard of each parameter this rank holds"""
    index: int
    """which machine this rank is on"""
    shard_group: Group
    """the ranks of this machine"""
    replica_group: Group
    """the ranks of the same ordinal on all machines"""


def find_machines(size: int) -> Machines:
    """Groups all ranks by machines of `size` ranks; every rank must call. Raises ValueError if they do not divide."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if size < 1 or world_size % size:
        raise ValueError(
            f"machine_size {size} does not divide the {world_size} processes; use one of "
            f"{', '.join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)}"
        )
    n = world_size // size
    # All ranks make all groups, in the same order.
    shard_groups = [dist.new_group(list(range(i * size, (i + 1) * size))) for i in range(n)]
    replica_groups = [dist.new_group(list(range(i, world_size, size))) for i in range(size)]
    return Machines(size, n, rank % size, rank // size, shard_groups[rank // size], replica_groups[rank % size])


def equalize_replicas(parameters: Iterable[Any], machines: Machines) -> None:
    """Gives every machine the shards of the first: DeepSpeed makes parameters equal inside a machine only."""
    for parameter in parameters:
        dist.broadcast(parameter.ds_tensor.data, machines.ordinal, group=machines.replica_group)


def shard_shape(name: str, shape: Sequence[int], n_shards: int) -> tuple[int, ...]:
    """The shape of a shard of a parameter: whole rows of a matrix, any part of a vector (flat, zero-padded).

    Raises ValueError for a matrix whose rows the shards do not divide: its shards would be no matrices.
    """
    if len(shape) != 2:
        return (math.ceil(math.prod(shape) / n_shards),)
    if shape[0] % n_shards:
        raise ValueError(
            f"{name} has {shape[0]} rows, which {n_shards} shards do not divide; choose another width or machine_size"
        )
    return shape[0] // n_shards, shape[1]


def scatter_sums(gradients: Sequence[Tensor], group: Group, divisor: float) -> list[Tensor]:
    """This rank's flat shards of the sums of gradients over the group, divided by `divisor` before they are summed.

    Gradients have one dtype, in which they travel. Shards are those of ZeRO-3: the flattened tensor, zero-padded, in
    equal parts.
    """
    n, ordinal = dist.get_world_size(group), dist.get_rank(group)
    lengths = [math.ceil(gradient.numel() / n) for gradient in gradients]
    if n == 1:
        return [gradient.reshape(-1) if divisor == 1 else gradient.reshape(-1) / divisor for gradient in gradients]
    sent = gradients[0].new_zeros(n, sum(lengths))
    begin = 0
    for gradient, length in zip(gradients, lengths, strict=True):
        flat, missing = gradient.reshape(-1), n * length - gradient.numel()
        if missing:  # padding copies, even by nothing
            flat = torch.nn.functional.pad(flat, (0, missing))
        torch.div(flat.view(n, length), divisor, out=sent[:, begin : begin + length])
        begin += length
    received = sent.new_empty(sum(lengths))
    dist.reduce_scatter_tensor(received, sent.view(-1), group=group)
    shards = torch.split(received, lengths)
    # Without the padding, of which the last ranks have some.
    real = [
        max(0, min(length, gradient.numel() - ordinal * length))
        for gradient, length in zip(gradients, lengths, strict=True)
    ]
    return [shard[:n_real] for shard, n_real in zip(shards, real, strict=True)]
