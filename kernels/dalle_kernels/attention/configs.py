"""Tile sizes of the Triton kernels: a committed table with a safe default, so that nothing is tuned while a run trains.

Tuning in the run makes results depend on timing noise, and fails on a machine without a GPU.
"""

from dataclasses import dataclass

from dalle_kernels.attention.masks import Mask

# The kernels by name, in the order in which a training step launches them.
PASSES = ("forward", "query_gradient", "key_gradient")


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps that share it, and stages of the pipeline of loads."""

    block_q: int
    block_k: int
    n_warps: int
    n_stages: int


@dataclass(frozen=True)
class Key:
    """What a table entry is for. `capability` is 90 for compute capability 9.0; `dtype` as torch prints it."""

    capability: int
    kind: str
    head_dim: int
    dtype: str
    text_len: int


def tile_for(name: str, key: Key, mask: Mask) -> Tile:
    """The tile of the pass `name`: the table's, else the default, cut to the size of the stream."""
    tile = TABLE.get(key, {}).get(name) or default_tile(name, key)
    # tl.dot takes sides from 16 up; the text loop steps by block_k too.
    return Tile(
        block_q=min(tile.block_q, _power_above(mask.image_len)),
        block_k=min(tile.block_k, _power_above(mask.text_len if name != "key_gradient" else mask.image_len)),
        n_warps=tile.n_warps,
        n_stages=tile.n_stages,
    )


def default_tile(name: str, key: Key) -> Tile:
    """A tile that fits into the shared memory (99 KB) of every GPU from capability 8.0 on.

    It compiles without spills, but for float32 in heads of 128, whose query gradient spills some 200 bytes a thread.
    """
    if key.dtype == "float32":
        if name == "key_gradient":
            return Tile(32, 32, n_warps=8, n_stages=1)
        return Tile(32, 32, n_warps=4, n_stages=2 if key.head_dim <= SMALL_HEAD else 1)
    if name == "key_gradient":
        return Tile(32, 64, n_warps=4 if key.head_dim <= SMALL_HEAD else 8, n_stages=2)
    return Tile(64, 32, n_warps=4, n_stages=2)


def _power_above(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


SMALL_HEAD = 64
# Chosen by compiling: no spills, and 16 (forward, query gradient) or 12 warps at once on a multiprocessor of capability
# 9.0 by registers and shared memory. The forward's tile is the largest of these, to read keys from L2 least often.
HOPPER = {
    "forward": Tile(128, 64, n_warps=8, n_stages=3),
    "query_gradient": Tile(64, 32, n_warps=4, n_stages=2),
    "key_gradient": Tile(32, 64, n_warps=4, n_stages=2),
}
TABLE: dict[Key, dict[str, Tile]] = {
    Key(90, "row", 64, "float16", 256): HOPPER,
    Key(90, "row", 64, "bfloat16", 256): HOPPER,
    Key(90, "column", 64, "float16", 256): HOPPER,
    Key(90, "column", 64, "bfloat16", 256): HOPPER,
    Key(90, "conv", 64, "float16", 256): HOPPER,
    Key(90, "conv", 64, "bfloat16", 256): HOPPER,
}
