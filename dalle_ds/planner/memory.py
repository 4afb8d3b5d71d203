"""Memory of a GPU by kind: what training keeps, the activations of a micro-batch, and what is there for a moment.

Activations of a layer, for each state of width d and with c bytes an entry in the branches: the stream before each
branch in float32 (8 d); the input of query, key and value, these three, the attention's output, and the MLP's input
(6 c d); what enters the activation function, its sigmoid and its result (12 c d); the softmax's normaliser for each
head and two numbers of each layer norm, in float32. With recomputation only the layer's input stays (4 d), and one
layer at a time has the rest. While a layer's gradients are made there are those of its widest tensors besides, and two
of the stream (8 c d + 8 d).

Start-up never takes more: there are no moments yet, of which it has at most as much in copies of weights.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from dalle_ds.config import PriorConfig
from dalle_ds.planner.parameters import count_parameters, factor_entries, layer_matrices, shard_shape, sharded_counts
from dalle_ds.planner.ways import WHOLE, Layout, Way

# Of models/cross_entropy.py: entries of logits at a time, which are there as logits and once more for their softmax.
LOGIT_CHUNK = 2**25
# DeepSpeed's sub_group_size: elements of a shard that ZeRO 3 updates at a time.
SUB_GROUP = 10**9
# Bytes an entry of P and of Q as they are kept, and of Q while it is under way: what is sent and what is received.
KEPT_FACTOR = {"1-6-9": 2}
SENT_FACTOR = {"1-6-9": 4}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a GPU by kind; `host` is in the memory of a machine: the iterate average, and what is offloaded."""

    weights: int
    master_weights: int
    gradients: int
    moments: int
    starts: int
    buckets: int
    activations: int
    working_layer: int
    gathered_weights: int
    scattered: int
    heads: int
    factors: int
    update: int
    host: int

    @property
    def state(self) -> int:
        """What is kept of parameters between steps."""
        return self.weights + self.master_weights + self.gradients + self.moments + self.starts

    @property
    def total(self) -> int:
        """The peak: at the heads, at the last layer, at the first one, where factors have replaced activations, or in
        the update."""
        at_layer = self.working_layer + self.gathered_weights + self.scattered
        at_heads = self.heads + self.gathered_weights
        peak = max(self.activations + max(at_heads, at_layer), self.factors + max(at_layer, self.update))
        return self.state + self.buckets + peak

    @property
    def temporary(self) -> int:
        """What is there at the peak beside state and activations."""
        return self.total - self.state - self.activations


def memory_of(config: PriorConfig, way: Way, layout: Layout) -> Memory:
    """The memory that a way of laying out takes."""
    kept, working = activation_bytes(config, layout.micro_batch, layout.recompute, way.compute_bytes)
    starts, factors = factor_bytes(config, way, layout)
    state = state_bytes(config, way, layout)
    host = host_bytes(config, way, layout)
    if way.offloads:
        host += layout.machine_size * _offloaded(config, way, layout)
        state |= {"master_weights": 0, "gradients": 0, "moments": 0}
    return Memory(
        **state,
        starts=starts,
        buckets=bucket_bytes(config, way),
        activations=kept,
        working_layer=working,
        gathered_weights=gathered_bytes(config, way, layout),
        scattered=scattered_bytes(config, way, layout),
        heads=head_bytes(config, layout.micro_batch),
        factors=factors,
        update=0 if way.offloads else update_bytes(config, way, layout),
        host=host,
    )


def state_bytes(config: PriorConfig, way: Way, layout: Layout) -> dict[str, int]:
    """Bytes of one process for weights, float32 copies, gradients and moments, wherever they are."""

    def both(matrix_bytes: int, rest_bytes: int, scope: str) -> int:
        matrices, rest = sharded_counts(config, layout.group_size(scope))
        return matrices * matrix_bytes + rest * rest_bytes

    large, rest = way.state.matrices, way.state.rest
    return {
        "weights": both(large.weight, rest.weight, way.weights),
        "master_weights": both(large.master, rest.master, way.optimizer),
        "gradients": both(large.gradient, rest.gradient, way.gradients),
        "moments": both(large.moments, rest.moments, way.optimizer),
    }


def host_bytes(config: PriorConfig, way: Way, layout: Layout) -> int:
    """Bytes of the iterate average of a machine's processes, in its memory (training/averaging.py).

    Each process keeps its part in float32, and a copy of what its optimizer updates.
    """
    matrices, rest = sharded_counts(config, layout.group_size(way.optimizer))
    copies = [kind.master or kind.weight for kind in (way.state.matrices, way.state.rest)]
    return layout.machine_size * (matrices * (4 + copies[0]) + rest * (4 + copies[1]))


def _offloaded(config: PriorConfig, way: Way, layout: Layout) -> int:
    """What DeepSpeed keeps on the host of one process: all but the weights, and gradients once more in float32."""
    state = state_bytes(config, way, layout)
    return sum(state.values()) - state["weights"] + 4 * sum(sharded_counts(config, layout.group_size(way.optimizer)))


def bucket_bytes(config: PriorConfig, way: Way) -> int:
    """Bytes of the buffers for gradients that are reduced together (setup of DeepSpeed's stage3.py, stage_1_and_2.py).

    ZeRO 3 has one a dtype; ZeRO 1 and 2 one, or two to overlap, and ZeRO 1 has in it what was added up.
    """
    buckets, large = way.buckets_for(config.dim), way.state.matrices
    if not buckets.contiguous or way.optimizer == WHOLE:
        return 0
    if way.weights != WHOLE:
        return buckets.reduce * sum({large.weight, way.state.rest.weight})
    width = min(4, large.gradient) if way.gradients == WHOLE else large.weight
    return buckets.reduce * width * (1 + way.overlaps)


def live_elements(config: PriorConfig, way: Way, layout: Layout) -> int:
    """Elements of whole weights that are there at a time (DeepSpeed's partitioned_param_coordinator.py).

    Prefetching stops after the parameter that exceeds its limit.
    """
    n = count_parameters(config).total
    if layout.group_size(way.weights) == 1:
        return n
    buckets = way.buckets_for(config.dim)
    # Of two uses, one in each pass, `reuse` elements apart.
    return min(n, max(buckets.live if buckets.prefetch else 0, buckets.reuse // 2) + largest_matrix(config))


def gathered_bytes(config: PriorConfig, way: Way, layout: Layout) -> int:
    """Bytes of the whole weights of a sharded model, and once more of what has just arrived and is put in order."""
    if layout.group_size(way.weights) == 1:
        return 0
    n, prefetch = count_parameters(config).total, way.buckets_for(config.dim).prefetch
    elements = live_elements(config, way, layout) + min(n, max(prefetch, largest_matrix(config)))
    wider = way.state.rest.weight - way.state.matrices.weight
    return elements * way.state.matrices.weight + config.dim * config.text_vocab_size * wider


def scattered_bytes(config: PriorConfig, way: Way, layout: Layout) -> int:
    """Bytes of gradients of matrices on their way to their shards, and from there to other machines.

    Some wait for others, the next one comes, and what is sent is a copy. Sums that are kept whole are copied as they
    are, and once more in the dtype in which they travel. Between machines two resblocks of a shard are under way, in
    float32.
    """
    buckets, matrix, large = way.buckets_for(config.dim), largest_matrix(config), way.state.matrices
    together = min(count_parameters(config).total, max(buckets.reduce, matrix))
    n_shards, width = layout.group_size(way.weights), large.weight
    coming = matrix if way.optimizer != WHOLE else 0
    if way.gradients == WHOLE:
        sums = min(4, large.gradient)
        return together * (sums + (width if width < sums else 0)) + coming * width if layout.n_gpus > 1 else 0
    coming += (together if layout.n_gpus > 1 else 0) + (0 if buckets.contiguous else together)
    between = 3 * matrix // n_shards if way.compressor and layout.n_gpus > n_shards else 0
    return coming * width + 4 * between


def update_bytes(config: PriorConfig, way: Way, layout: Layout) -> int:
    """Bytes of a float32 gradient of what is updated at once, and as many for AdamW's root, or for decoding errors."""
    n_shards = layout.group_size(way.optimizer)
    counts = count_parameters(config)
    if way.by_resblock:
        at_once = max(2 * largest_matrix(config), counts.tables)
    else:
        at_once = min(counts.total, SUB_GROUP * n_shards) if way.weights != WHOLE else counts.total
    return 8 * at_once // n_shards


def factor_bytes(config: PriorConfig, way: Way, layout: Layout) -> tuple[int, int]:
    """Bytes of (Q0, which is kept; P and Q, which an update has) of all matrices."""
    if not way.is_compressed:
        return 0, 0
    n_shards = layout.group_size(way.weights)
    rank = (way.matrix_rank or layout.matrix_rank) // n_shards
    factors = [factor_entries(shard_shape(shape, n_shards), rank) for shape in layer_matrices(config)]
    of_p, of_q = (config.n_layer * sum(entries) for entries in zip(*factors, strict=True))
    kept, sent = KEPT_FACTOR.get(way.wire, 4), SENT_FACTOR.get(way.wire, 4)
    return kept * of_q, kept * of_p + sent * of_q


def activation_bytes(config: PriorConfig, micro_batch: int, recompute: bool, compute: int) -> tuple[int, int]:
    """(bytes kept from the forward to the backward pass, bytes of the one layer at work in the backward pass)."""
    states, d = micro_batch * config.seq_len, config.dim
    layer = states * (8 * d + 18 * compute * d + 4 * (config.n_head + 4))
    gradients = states * (8 * compute * d + 8 * d)
    if recompute:
        return config.n_layer * states * 4 * d, layer + gradients
    return config.n_layer * layer, gradients


def head_bytes(config: PriorConfig, micro_batch: int) -> int:
    """Bytes at the heads, all of it in float32 (models/cross_entropy.py).

    A chunk of logits twice, normed states with their gradients, the unembeddings' gradients, and one of these once
    more, when it is added up and when it is handed on.
    """
    d = config.dim
    sizes = ((config.text_len - 1, config.text_vocab_size), (config.image_len, config.image_vocab_size))
    logits = max(min(LOGIT_CHUNK, states * micro_batch * vocabulary) for states, vocabulary in sizes)
    gradients = [d * vocabulary for _, vocabulary in sizes]
    return 4 * (2 * logits + 2 * d * config.seq_len * micro_batch + sum(gradients) + max(gradients))


def largest_matrix(config: PriorConfig) -> int:
    """Entries of either matrix of an MLP."""
    return 4 * config.dim**2


def as_dict(memory: Memory) -> Mapping[str, int]:
    """All kinds, and what they add up to, in bytes."""
    return {**asdict(memory), "state": memory.state, "temporary": memory.temporary, "total": memory.total}
