"""Memory of a GPU by kind: what training keeps, the activations of a micro-batch, and what is there for a moment.

Activations of a layer, for each state of width d and with c bytes an entry in the branches: the stream before each
branch in float32 (8 d); the input of query, key and value, these three, the attention's output, and the MLP's input
(6 c d); what enters the activation function, its sigmoid and its result (12 c d); the softmax's normaliser for each
head and two numbers of each layer norm, in float32. With recomputation only the layer's input stays (4 d), and one
layer at a time has the rest. While a layer's gradients are made there are those of its widest tensors besides, and two
of the stream (8 c d + 8 d).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from dalle_ds.config import PriorConfig
from dalle_ds.planner.parameters import count_parameters, layer_matrices, shard_shape, sharded_counts
from dalle_ds.planner.ways import WHOLE, Way

# Of models/cross_entropy.py: entries of logits at a time, which are there as logits and once more for their softmax.
LOGIT_CHUNK = 2**25


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What memory depends on beside model and way. Buckets in elements; 0 for those of one layer."""

    n_gpus: int
    machine_size: int
    micro_batch: int = 1
    recompute: bool = True
    matrix_rank: int = 0
    live_elements: int = 0
    bucket_elements: int = 0

    @property
    def n_machines(self) -> int:
        return self.n_gpus // self.machine_size


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a GPU by kind; `host_average` is the iterate average, in the memory of a machine."""

    weights: int
    master_weights: int
    gradients: int
    error_buffers: int
    moments: int
    starts: int
    factors: int
    activations: int
    working_layer: int
    gathered_weights: int
    buckets: int
    logits: int
    host_average: int

    @property
    def state(self) -> int:
        """What the optimizer keeps between steps."""
        return self.weights + self.master_weights + self.gradients + self.error_buffers + self.moments + self.starts

    @property
    def total(self) -> int:
        """The peak: at the heads, at the last layer, or the first one, where factors have replaced activations."""
        at_layer = self.working_layer + self.gathered_weights + self.buckets
        return self.state + max(self.activations + max(self.logits, at_layer), self.factors + at_layer)

    @property
    def temporary(self) -> int:
        return self.total - self.state - self.activations


def memory_of(config: PriorConfig, way: Way, layout: Layout) -> Memory:
    """The memory that a way of laying out takes."""
    layer = 12 * config.dim**2
    gathered = 0
    if way.weights != WHOLE:
        # The resblock at work and the next one: a layer.
        gathered = min(config.n_layer * layer, max(layer, layout.live_elements)) * way.state.matrices.weight
    # One layer's gradients on their way, or into their buffer.
    buckets = (layout.bucket_elements or layer) * way.state.matrices.weight
    kept, working = activation_bytes(config, layout.micro_batch, layout.recompute, way.compute_bytes)
    starts, factors = factor_bytes(config, layout) if way.is_compressed else (0, 0)
    n_copies = layout.n_gpus // way.group_size(way.optimizer, layout.n_gpus, layout.machine_size)
    average = 4 * count_parameters(config).total * n_copies
    return Memory(
        **state_bytes(config, way, layout.n_gpus, layout.machine_size),
        starts=starts,
        factors=factors,
        activations=kept,
        working_layer=working,
        gathered_weights=gathered,
        buckets=buckets,
        logits=head_bytes(config, way, layout.micro_batch),
        host_average=-(-average // layout.n_machines),
    )


def state_bytes(config: PriorConfig, way: Way, n_gpus: int, machine_size: int) -> dict[str, int]:
    """Bytes of a GPU for weights, float32 copies, gradients, error buffers and moments."""

    def both(matrix_bytes: int, rest_bytes: int, scope: str) -> int:
        matrices, rest = sharded_counts(config, way.group_size(scope, n_gpus, machine_size))
        return matrices * matrix_bytes + rest * rest_bytes

    large, rest = way.state.matrices, way.state.rest
    buffered = 0 if way.is_compressed and way.errors_hold_gradients else large.gradient
    return {
        "weights": both(large.weight, rest.weight, way.weights),
        "master_weights": both(large.master, rest.master, way.optimizer),
        "gradients": both(buffered, rest.gradient, way.gradients),
        "error_buffers": both(way.error_bytes, 0, way.gradients) if way.is_compressed else 0,
        "moments": both(large.moments, rest.moments, way.optimizer),
    }


def factor_bytes(config: PriorConfig, layout: Layout) -> tuple[int, int]:
    """(Q0, which is kept; P and Q, which an update has) of all matrices in float32, as `dalle_kernels` has them."""
    starts = factors = 0
    for shape in layer_matrices(config):
        rows, columns = shard_shape(shape, layout.machine_size)
        rank = min(layout.matrix_rank // layout.machine_size, rows, columns)
        starts += rank * max(rows, columns)
        factors += rank * (rows + columns)
    return 4 * starts * config.n_layer, 4 * factors * config.n_layer


def activation_bytes(config: PriorConfig, micro_batch: int, recompute: bool, compute: int) -> tuple[int, int]:
    """(bytes kept from the forward to the backward pass, bytes of the one layer at work in the backward pass)."""
    states, d = micro_batch * config.seq_len, config.dim
    layer = states * (8 * d + 18 * compute * d + 4 * (config.n_head + 4))
    gradients = states * (8 * compute * d + 8 * d)
    if recompute:
        return config.n_layer * states * 4 * d, layer + gradients
    return config.n_layer * layer, gradients


def head_bytes(config: PriorConfig, way: Way, micro_batch: int) -> int:
    """A chunk of logits, the unembeddings' gradients made with it in float32, normed states, a gathered unembedding."""
    d = config.dim
    sizes = ((config.text_len - 1, config.text_vocab_size), (config.image_len, config.image_vocab_size))
    logits = max(min(LOGIT_CHUNK, states * micro_batch * vocabulary) for states, vocabulary in sizes)
    gradients = sum(d * vocabulary for _, vocabulary in sizes)
    normed = 2 * d * config.seq_len * micro_batch
    gathered = max(d * vocabulary for _, vocabulary in sizes) if way.weights != WHOLE else 0
    return 4 * (2 * logits + gradients + normed) + gathered * way.state.rest.weight


def as_dict(memory: Memory) -> Mapping[str, int]:
    return {**asdict(memory), "state": memory.state, "temporary": memory.temporary, "total": memory.total}
