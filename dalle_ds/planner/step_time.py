"""How long a step takes, by a model that is stated here and nowhere measured.

Products run at `efficiency` of the peak, links at `link_efficiency` of theirs. What is sent takes bytes / bandwidth +
latency (collectives.py), inside and between machines at once. It hides behind the computation of its own pass: gathers
of the forward pass behind that, gathers and scatters of the backward pass behind that, averages of resblocks between
machines behind the backward pass of the last micro-step (Appendix E.2); only what is longer adds to the step. Where
communication does not overlap, all of it adds.

What does not hide either: what follows the backward pass; adding gradients up, where each entry of a shard is read,
with its sum, and written; PowerSGD, whose products run in float32; and the optimizer, which reads and writes all state
once. For PowerSGD 42 bytes an entry go through the memory: the errors are decoded twice and encoded once (18), the
float32 matrix is read for P, for Q and to take the product from it, which is written and read (20), and the rest of it
written (4). Orthogonalising starts many small kernels one after the other, on which a GPU waits for the processor. Left
out: coding of what is sent, which is a tenth of that, and the way to the host and back of an offloaded optimizer.

`one_after_the_other` is the step with nothing hidden.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dalle_ds.config import PriorConfig
from dalle_ds.planner.arithmetic import training_flops
from dalle_ds.planner.collectives import Links
from dalle_ds.planner.hardware import Hardware
from dalle_ds.planner.memory import Memory
from dalle_ds.planner.parameters import layer_matrices, matrix_shapes, rank_of, shard_shape, sharded_counts
from dalle_ds.planner.traffic import Exchange
from dalle_ds.planner.ways import Layout, Way

COMPRESSION_BYTES = 42
# Columns that `dalle_kernels.compression.orthogonalize.householder` reflects together on a GPU, the kernels that it
# starts for them in a batch of matrices, and what PyTorch takes to start one (an assumption).
PANEL, PANEL_KERNELS, LAUNCH = 8, 14, 5e-6


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step. `inside` and `between` are all of that communication, of which `exposed` does not hide, and of
    that `waits` are due to latency; only `exposed` is a part of the total."""

    forward: float
    backward: float
    inside: float
    between: float
    exposed: float
    waits: float
    accumulation: float
    compression: float
    optimizer: float

    @property
    def total(self) -> float:
        """The step."""
        return self.forward + self.backward + self.exposed + self.accumulation + self.compression + self.optimizer

    @property
    def one_after_the_other(self) -> float:
        """The step, if no communication overlaps."""
        return self.total - self.exposed + self.inside + self.between


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a GPU and its links reach, as parts of what the hardware could; `latency` is 1, or 0 to leave it out."""

    hardware: Hardware
    efficiency: float
    link_efficiency: float
    latency: float = 1.0

    def seconds(self, exchanges: Iterable[Exchange], layout: Layout) -> Links:
        """What each of these takes once, one after the other."""
        total = Links()
        for one in exchanges:
            sent = one.sent(layout)
            total += one.waits(layout) * self.latency + Links(
                inside=sent.inside / (self.link_efficiency * self.hardware.machine_bandwidth),
                between=sent.between / (self.link_efficiency * self.hardware.network_bandwidth),
            )
        return total


def step_time_of(
    config: PriorConfig,
    way: Way,
    layout: Layout,
    memory: Memory,
    exchanges: Sequence[Exchange],
    speeds: Speeds,
    n_micro_steps: int,
) -> StepTime:
    """The time of a step of `n_micro_steps` micro-batches on each GPU."""
    flops, hardware = training_flops(config), speeds.hardware
    products = speeds.efficiency * (hardware.flops if way.compute_bytes == 2 else hardware.flops_32)
    forward = layout.micro_batch * flops.forward() / products
    backward = layout.micro_batch * flops.backward(layout.recompute) / products
    behind = (forward, backward) if way.overlaps else (0.0, 0.0)
    exposed, at_once = (
        exposed_seconds(exchanges, layout, one, behind, n_micro_steps) for one in (speeds, replace(speeds, latency=0.0))
    )
    repeated = speeds.seconds([one for one in exchanges for _ in range(one.times)], layout)
    return StepTime(
        forward=n_micro_steps * forward,
        backward=n_micro_steps * backward,
        inside=repeated.inside,
        between=repeated.between,
        exposed=exposed,
        waits=exposed - at_once,
        accumulation=n_micro_steps * accumulated_bytes(config, way, layout) / hardware.memory_bandwidth,
        compression=compression_seconds(config, way, layout, speeds) if way.is_compressed else 0.0,
        optimizer=0.0 if way.offloads else 2 * memory.state / hardware.memory_bandwidth,
    )


def exposed_seconds(
    exchanges: Sequence[Exchange],
    layout: Layout,
    speeds: Speeds,
    behind: tuple[float, float],
    n_micro_steps: int,
) -> float:
    """Seconds of communication that do not hide `behind` the forward and the backward pass of a micro-step."""

    def longest(*when: str) -> float:
        # The links of a machine and the network work at once.
        links = speeds.seconds((one for one in exchanges if one.when in when), layout)
        return max(links.inside, links.between)

    forward, backward = behind
    return (
        n_micro_steps * max(0.0, longest("forward") - forward)
        + (n_micro_steps - 1) * max(0.0, longest("backward") - backward)
        + max(0.0, longest("backward", "last backward") - backward)
        + longest("end")
    )


def accumulated_bytes(config: PriorConfig, way: Way, layout: Layout) -> int:
    """Through the memory in a micro-step: a shard's gradients, their sums before, and their sums after."""
    matrices, rest = sharded_counts(config, layout.group_size(way.gradients))
    large, small = way.state.matrices, way.state.rest
    return matrices * (large.weight + 2 * large.gradient) + rest * (small.weight + 2 * small.gradient)


def compression_seconds(config: PriorConfig, way: Way, layout: Layout, speeds: Speeds) -> float:
    """Of PowerSGD on a GPU: products for P, Q and what they stand for, passes over memory, and orthogonalising."""
    n_shards = layout.group_size(way.weights)
    rank = (way.matrix_rank or layout.matrix_rank) // n_shards
    shards = [shard_shape(shape, n_shards) for shape in layer_matrices(config)]
    ranks = [rank_of(shard, rank) for shard in shards]
    entries = sum(map(math.prod, shards))
    flops = sum(
        # Householder reflections and the product that they make, of min(shard) x r: 2 min(shard) r^2 each.
        3 * 2 * math.prod(shard) * r + 4 * min(shard) * r**2
        for shard, r in zip(shards, ranks, strict=True)
    )
    # The matrices of a resblock have one shape each, and are orthogonalised together.
    n_kernels = PANEL_KERNELS * len(matrix_shapes(config)) * math.ceil(max(ranks) / PANEL)
    layer = (
        flops / (speeds.efficiency * speeds.hardware.flops_32)
        + COMPRESSION_BYTES * entries / speeds.hardware.memory_bandwidth
        + n_kernels * LAUNCH
    )
    return config.n_layer * layer
