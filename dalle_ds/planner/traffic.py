"""What a GPU hands to collectives in a step: weights, gradients, and between machines those or PowerSGD's factors.

Sizes are those of real engines of DeepSpeed 0.19.8, which tests count at torch's collectives. Its ZeRO 1 and 2 average
gradients with all-reduces, where scatters would do.
"""

import math
from dataclasses import dataclass

from dalle_ds.config import PriorConfig
from dalle_ds.planner.collectives import AVERAGE, CODED_AVERAGE, GATHER, SCATTER, Links, bytes_sent, latency
from dalle_ds.planner.memory import live_elements
from dalle_ds.planner.parameters import (
    Matrix,
    count_parameters,
    factor_entries,
    matrix_shapes,
    shard_shape,
    sharded_counts,
)
from dalle_ds.planner.ways import ALL, REPLICAS, WHOLE, Layout, Way

# Bytes an entry of the formats of `dalle_kernels.compression.wire.WIRES`.
WIRE_BYTES = {"full": 4, "float16": 2, "bfloat16": 2, "1-6-9": 2}
CODED_WIRE = "1-6-9"
# In each micro-step; with the last one's backward pass; after it.
WHEN = ("forward", "backward", "last backward", "end")
# Flat tensors in which ZeRO 1 and 2 gather what was updated: matrices, and vectors, which are not decayed.
N_GROUPS = 2


@dataclass(frozen=True, kw_only=True)
class Payload:
    """What a GPU hands to the averages of a compressor in one update, in bytes and calls (`wire.Traffic`)."""

    matrix_bytes: int
    whole_bytes: int
    n_calls: int

    @property
    def total(self) -> int:
        return self.matrix_bytes + self.whole_bytes


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
    factors = [factor_entries(shard, matrix_rank // machine_size) for shard in shards]
    return [list(entries) for entries in zip(*factors, strict=True)]


def compression_rate(config: PriorConfig, machine_size: int, matrix_rank: int) -> float:
    """The part of the matrices' gradients that is not sent: 1 - r (m + 2) / (2 d m) by Table 2."""
    shards = [shard_shape(shape, machine_size) for block in matrix_shapes(config).values() for shape in block.values()]
    factors = sum(sum(factor_entries(shard, matrix_rank // machine_size)) for shard in shards)
    return 1 - factors / sum(map(math.prod, shards))


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One kind of exchange: when (see WHEN) and how often in a step; each time `n_bytes` of a whole array, in calls."""

    what: str
    when: str
    times: int
    collective: str
    scope: str
    n_bytes: int
    n_calls: int

    def sent(self, layout: Layout) -> Links:
        """Bytes that a GPU sends each time."""
        return bytes_sent(self.collective, self.scope, self.n_bytes, layout)

    def waits(self, layout: Layout) -> Links:
        """Seconds each time until first bytes are there."""
        return latency(self.collective, self.scope, layout) * self.n_calls


def exchanges_of(config: PriorConfig, way: Way, layout: Layout, n_micro_steps: int) -> list[Exchange]:
    """All that a GPU hands to collectives in a step of `n_micro_steps`.

    Weights travel as they are stored, and gradients in the dtype of their weights.
    """
    if layout.n_gpus == 1:
        return []
    if way.weights != WHOLE:
        return _of_sharded_weights(config, way, layout, n_micro_steps)
    return _of_whole_weights(config, way, layout, n_micro_steps)


def _of_sharded_weights(config: PriorConfig, way: Way, layout: Layout, n_micro_steps: int) -> list[Exchange]:
    """ZeRO 3. Weights that are still there from the forward pass are not gathered again for the backward pass, which
    recomputes activations with the same ones (Section 2.5)."""
    buckets, n = way.buckets_for(config.dim), count_parameters(config).total
    n_bytes, scope = _weight_bytes(config, way, layout.group_size(way.weights)), way.weights
    again = 1 - live_elements(config, way, layout) / n
    # What is gathered ahead has gains and biases among it: a call for each dtype.
    n_gathers = _n_dtypes(way) * _n_buckets(n, buckets.prefetch)
    n_scatters = _n_buckets(n, buckets.reduce) + _n_dtypes(way) - 1
    found = [_exchange("gather weights, forward", "forward", GATHER, scope, n_bytes, n_gathers, n_micro_steps)]
    if again:
        part = round(again * n_bytes), math.ceil(again * n_gathers)
        found.append(_exchange("gather weights, backward", "backward", GATHER, scope, *part, n_micro_steps))
    found.append(_exchange("scatter gradients", "backward", SCATTER, scope, n_bytes, n_scatters, n_micro_steps))
    if way.is_hierarchical and layout.n_machines > 1:
        # A resblock leaves when DeepSpeed has handed it over, a bucket at a time.
        is_one_bucket = _n_buckets(n, buckets.reduce) == 1
        found += _averages(config, way, layout, "end" if is_one_bucket else "last backward", REPLICAS)
    return found


def _of_whole_weights(config: PriorConfig, way: Way, layout: Layout, n_micro_steps: int) -> list[Exchange]:
    """ZeRO 0, 1 and 2; a compressor averages all gradients before the update."""
    n, n_bytes = count_parameters(config).total, _weight_bytes(config, way, 1)
    if way.compressor:
        found = _averages(config, way, layout, "end", ALL)
    else:
        when = "backward" if way.gradients != WHOLE else "last backward" if way.overlaps else "end"
        n_calls = _n_buckets(n, way.buckets_for(config.dim).reduce)
        found = [_exchange("average gradients", when, AVERAGE, ALL, n_bytes, n_calls, n_micro_steps)]
    if way.optimizer != WHOLE:
        found.append(_exchange("gather updated weights", "end", GATHER, ALL, n_bytes, N_GROUPS))
    return found


def _averages(config: PriorConfig, way: Way, layout: Layout, when: str, scope: str) -> list[Exchange]:
    """A compressor's: of matrices or their factors, and of all the rest."""
    payload, what = payload_of(config, way, layout), "average P and Q" if way.is_compressed else "average matrices"
    collective = CODED_AVERAGE if way.wire == CODED_WIRE else AVERAGE
    return [
        _exchange(what, when, collective, scope, payload.matrix_bytes, payload.n_calls - 1),
        # Once all gradients are there.
        _exchange("average the rest", "end", AVERAGE, scope, payload.whole_bytes, 1),
    ]


def _exchange(
    what: str, when: str, collective: str, scope: str, n_bytes: int, n_calls: int, n_micro_steps: int = 1
) -> Exchange:
    return Exchange(
        what=what,
        when=when,
        times=n_micro_steps if when in ("forward", "backward") else 1,
        collective=collective,
        scope=scope,
        n_bytes=n_bytes,
        n_calls=n_calls,
    )


def payload_of(config: PriorConfig, way: Way, layout: Layout) -> Payload:
    """What a way's compressor averages in an update."""
    n_shards = layout.group_size(way.weights)
    rank = (way.matrix_rank or layout.matrix_rank) if way.is_compressed else 0
    return bytes_between_machines(config, n_shards, layout.n_gpus // n_shards, rank, way.wire)


def _weight_bytes(config: PriorConfig, way: Way, n_shards: int) -> int:
    """All weights as they are stored, with the padding of their shards."""
    matrices, rest = sharded_counts(config, n_shards)
    return n_shards * (matrices * way.state.matrices.weight + rest * way.state.rest.weight)


def _n_buckets(n: int, bucket: int) -> int:
    return math.ceil(n / max(1, bucket))


def _n_dtypes(way: Way) -> int:
    return 1 + (way.state.matrices.weight != way.state.rest.weight)
