"""Bytes that a GPU sends in a step: inside its machine and between machines, whole or as PowerSGD's factors.

Of a gathered or scattered array of S bytes in all, each of k GPUs sends S (k - 1) / k; an all-reduce does both. Over
all GPUs of n machines of m, what crosses the network is S (n - 1) / n, a GPU's part of it S (n - 1) / (n m). Averaging
payloads of S bytes between machines sends 2 S (n - 1) / n. Counters of compressors (`wire.Traffic`) count payloads.
"""

import math
from dataclasses import dataclass

from dalle_ds.config import PriorConfig
from dalle_ds.planner.hardware import MACHINE_LATENCY, NETWORK_LATENCY
from dalle_ds.planner.memory import Layout
from dalle_ds.planner.parameters import Matrix, count_parameters, matrix_shapes, shard_shape, sharded_counts
from dalle_ds.planner.ways import ALL, WHOLE, Way

# Bytes an entry of the formats of `dalle_kernels.compression.wire.WIRES`.
WIRE_BYTES = {"full": 4, "float16": 2, "bfloat16": 2, "1-6-9": 2}
CODED_WIRE = "1-6-9"
# In each micro-step; with the last one's backward pass; after the update.
WHEN = ("forward", "backward", "last backward", "end")


@dataclass(frozen=True, kw_only=True)
class Payload:
    """What a GPU hands to the collectives between machines in one update, in bytes and calls."""

    matrix_bytes: int
    whole_bytes: int
    n_calls: int

    @property
    def total(self) -> int:
        return self.matrix_bytes + self.whole_bytes


def n_factor_entries(rows: int, columns: int, shard_rank: int) -> int:
    """Entries of P and Q of one matrix, or of a shard of one."""
    return min(shard_rank, rows, columns) * (rows + columns)


def bytes_between_machines(
    config: PriorConfig, machine_size: int, n_machines: int, matrix_rank: int = 0, wire: str = CODED_WIRE
) -> Payload:
    """The payload of an update under hierarchical sharding; a `matrix_rank` of 0 sends matrices as they are.

    P and Q of a resblock travel grouped, all that is no matrix in one 32-bit average, with a flag of 4 bytes a
    compressed matrix. 1-6-9 travels in equal parts, so that each group is padded to a multiple of the machines.
    """
    sent = [
        sum(sizes)
        for block in matrix_shapes(config).values()
        for sizes in _entries([shard_shape(shape, machine_size) for shape in block.values()], matrix_rank, machine_size)
    ]
    padded = [entries + (-entries % n_machines if wire == CODED_WIRE else 0) for entries in sent]
    n_matrices = config.n_layer * sum(map(len, matrix_shapes(config).values()))
    rest = sharded_counts(config, machine_size)[1]
    return Payload(
        matrix_bytes=WIRE_BYTES[wire] * config.n_layer * sum(padded),
        whole_bytes=4 * (rest + (n_matrices if matrix_rank else 0)),
        n_calls=config.n_layer * len(padded) + 1,
    )


def _entries(shards: list[Matrix], matrix_rank: int, machine_size: int) -> list[list[int]]:
    """Entries of each shard in each group that a resblock sends: its P and its Q, or the shards themselves."""
    if not matrix_rank:
        return [[math.prod(shard) for shard in shards]]
    shard_rank = matrix_rank // machine_size
    return [
        [min(shard_rank, *shard) * side for shard, side in zip(shards, sides, strict=True)]
        for sides in (map(min, shards), map(max, shards))
    ]


def compression_rate(config: PriorConfig, machine_size: int, matrix_rank: int) -> float:
    """The part of the matrices' gradients that is not sent: 1 - r (m + 2) / (2 d m) by Table 2."""
    shards = [shard_shape(shape, machine_size) for block in matrix_shapes(config).values() for shape in block.values()]
    factors = sum(n_factor_entries(*shard, matrix_rank // machine_size) for shard in shards)
    return 1 - factors / sum(map(math.prod, shards))


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One kind of exchange: when (see WHEN) and how often a step does it, and the bytes and latencies of each time."""

    what: str
    when: str
    times: int
    inside: float
    between: float = 0.0
    inside_latency: float = 0.0
    between_latency: float = 0.0


def exchanges_of(config: PriorConfig, way: Way, layout: Layout, n_micro_steps: int, wire: str) -> list[Exchange]:
    """All that a GPU sends in a step. Weights travel as they are stored, and gradients in the dtype of their weights.

    A layer's weights are gathered for the forward pass and once more for the backward pass, which recomputes
    activations with the same ones (Section 2.5), if DeepSpeed's `stage3_max_reuse_distance` is more than a layer.
    """
    if layout.n_gpus == 1:
        return []
    counts, state = count_parameters(config), way.state
    weights = counts.matrices * state.matrices.weight + counts.rest * state.rest.weight
    n_calls = 2 * config.n_layer + 1
    found = []

    def add(what: str, when: str, n_bytes: int, repeated: bool) -> None:
        scope = way.weights if way.is_hierarchical else ALL
        sizes = _spread(n_bytes, scope, layout, n_calls)
        found.append(Exchange(what=what, when=when, times=n_micro_steps if repeated else 1, **sizes))

    if way.weights != WHOLE:
        add("gather weights, forward", "forward", weights, True)
        add("gather weights, backward", "backward", weights, True)
    sharded = way.gradients != WHOLE
    # Without ZeRO, DeepSpeed averages gradients once the backward pass is over.
    once = "end" if way.optimizer == WHOLE else "last backward"
    add("scatter gradients", "backward" if sharded else once, weights, sharded)
    if way.weights == WHOLE and way.optimizer != WHOLE:
        add("gather updated weights", "end", weights, False)
    elif way.weights == WHOLE:
        add("gather gradients", "end", weights, False)
    if way.is_hierarchical and layout.n_machines > 1:
        found.append(_between(config, way, layout, wire))
    return found


def _spread(n_bytes: int, scope: str, layout: Layout, n_calls: int) -> dict[str, float]:
    m, n = layout.machine_size, layout.n_machines
    sizes = {"inside": n_bytes * (m - 1) / m, "inside_latency": n_calls * (m - 1) * MACHINE_LATENCY}
    if scope == ALL:
        sizes |= {"between": n_bytes * (n - 1) / (n * m), "between_latency": n_calls * (n - 1) * NETWORK_LATENCY}
    return sizes


def _between(config: PriorConfig, way: Way, layout: Layout, wire: str) -> Exchange:
    """The average between machines: an all-reduce, of 2 log2(n) hops; in 1-6-9 all-to-all and all-gather, of n - 1."""
    n = layout.n_machines
    rank = layout.matrix_rank if way.is_compressed else 0
    payload = bytes_between_machines(config, layout.machine_size, n, rank, wire)
    hops = 2 * (n - 1) if wire == CODED_WIRE else 2 * math.ceil(math.log2(n))
    return Exchange(
        what="average between machines",
        when="last backward",
        times=1,
        inside=0.0,
        between=2 * payload.total * (n - 1) / n,
        between_latency=payload.n_calls * hops * NETWORK_LATENCY,
    )
