"""The prior's parameters in closed form: names, shapes as stored, counts by kind, and what a shard holds.

Matrices are sharded over GPUs in whole rows of the stored weight (DeepSpeed's flat shards): the layout of the paper's
Table 2, where the second MLP matrix is stored as its transpose, so that its shard too is [4 dim / m, dim].
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dalle_ds.config import PriorConfig

Shape = tuple[int, ...]
Matrix = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters by kind. Section 2.4 keeps all but the matrices in 32 bits."""

    matrices: int
    vectors: int
    tables: int

    @property
    def rest(self) -> int:
        return self.vectors + self.tables

    @property
    def total(self) -> int:
        return self.matrices + self.rest


def count_parameters(config: PriorConfig) -> ParameterCounts:
    """Matrices of the resblocks; gains and biases; embeddings, unembeddings and positions."""
    d, vocabularies = config.dim, config.text_vocab_size + config.image_vocab_size
    # Norms of two branches, biases of attention, biases of the MLP; a norm more at the end of each branch if asked for.
    layer_vectors = (4 + 4 + 5 + 4 * config.sandwich_norm) * d
    starts, positions = 2, 2 * config.text_len + 2 * config.grid_size
    return ParameterCounts(
        matrices=12 * d**2 * config.n_layer,
        vectors=layer_vectors * config.n_layer + 4 * d,
        tables=(2 * vocabularies + starts + positions) * d,
    )


def matrix_shapes(config: PriorConfig) -> dict[str, dict[str, Matrix]]:
    """The matrices of one layer, by resblock and name, as they are stored."""
    d = config.dim
    attention: dict[str, Matrix] = {f"attention.{name}.weight": (d, d) for name in ("query", "key", "value", "project")}
    return {"attention": attention, "mlp": {"mlp.up.weight": (4 * d, d), "mlp.down.weight": (4 * d, d)}}


def vector_shapes(config: PriorConfig) -> dict[str, Shape]:
    """The gains and biases of one layer."""
    d = config.dim
    norms = ["attention_norm", "mlp_norm"]
    if config.sandwich_norm:
        norms += ["attention_end.0", "mlp_end.0"]
    shapes: dict[str, Shape] = {f"{norm}.{part}": (d,) for norm in norms for part in ("weight", "bias")}
    shapes |= {f"attention.{name}.bias": (d,) for name in ("query", "key", "value", "project")}
    return shapes | {"mlp.up.bias": (4 * d,), "mlp.down.bias": (d,)}


def outer_shapes(config: PriorConfig) -> dict[str, Shape]:
    """What lies outside the layers: embeddings, positions, and heads with their norms."""
    d = config.dim
    rows = {
        "text_states.tokens": config.text_vocab_size,
        "text_states.start": 1,
        "text_states.position": config.text_len,
        "text_states.pad": config.text_len,
        "image_states.tokens": config.image_vocab_size,
        "image_states.start": 1,
        "image_states.row": config.grid_size,
        "image_states.column": config.grid_size,
        "text_head.unembed.weight": config.text_vocab_size,
        "image_head.unembed.weight": config.image_vocab_size,
    }
    shapes: dict[str, Shape] = {name: (n, d) for name, n in rows.items()}
    return shapes | {f"{kind}_head.norm.{part}": (d,) for kind in ("text", "image") for part in ("weight", "bias")}


def layer_matrices(config: PriorConfig) -> list[Matrix]:
    """Shapes of the matrices of one layer, as they are stored."""
    return [shape for block in matrix_shapes(config).values() for shape in block.values()]


def shard_shape(shape: Matrix, n_shards: int) -> Matrix:
    """The largest shard of a matrix: rows are cut, and rounded up where n_shards does not divide them."""
    return -(-shape[0] // n_shards), shape[1]


def rank_of(shard: Matrix, shard_rank: int) -> int:
    """The rank to which PowerSGD compresses a shard: no more than its sides."""
    return min(shard_rank, *shard)


def factor_entries(shard: Matrix, shard_rank: int) -> tuple[int, int]:
    """Entries of (P, Q) of a shard of a matrix; P has its shorter side."""
    rank = rank_of(shard, shard_rank)
    return rank * min(shard), rank * max(shard)


def shards_are_whole_rows(config: PriorConfig, n_shards: int) -> bool:
    """Whether the shards of all matrices are matrices, which PowerSGD needs."""
    return all(shape[0] % n_shards == 0 for shape in layer_matrices(config))


def sharded_counts(config: PriorConfig, n_shards: int) -> tuple[int, int]:
    """Entries of (the matrices, the rest) in a shard: each parameter is cut in equal parts, the last one padded."""

    def count(shapes: Iterable[Shape]) -> int:
        return sum(-(-math.prod(shape) // n_shards) for shape in shapes)

    vectors = count(vector_shapes(config).values())
    rest = config.n_layer * vectors + count(outer_shapes(config).values())
    return config.n_layer * count(layer_matrices(config)), rest
