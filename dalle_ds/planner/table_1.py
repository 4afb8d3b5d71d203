"""The paper's Table 1, from our closed forms: what PowerSGD saves at each of its sizes; and the rank for any other."""

from dalle_ds.config import PriorConfig
from dalle_ds.planner.parameters import count_parameters
from dalle_ds.planner.traffic import compression_rate

# Width -> matrix rank.
RANKS = {1920: 512, 2688: 640, 3968: 896}
RATES = (0.83, 0.85, 0.86)
MACHINE, HEAD_DIM = 8, 64
# Of the ranks above, 0.23 to 0.27.
RANK_TO_WIDTH = 0.25


def default_matrix_rank(dim: int, machine_size: int) -> int:
    """Table 1's rank for its widths, else a quarter of the width; rounded up to a multiple of the machine's GPUs."""
    rank = RANKS.get(dim, round(dim * RANK_TO_WIDTH))
    return max(1, -(-rank // machine_size)) * machine_size


def table_1() -> list[dict[str, float]]:
    """Its rows: 64 layers, heads of 64, 8 GPUs a machine."""
    rows = []
    for (dim, rank), paper_rate in zip(RANKS.items(), RATES, strict=True):
        model = PriorConfig(n_head=dim // HEAD_DIM)
        rows.append(
            {
                "parameters": count_parameters(model).matrices,
                "dim": dim,
                "matrix_rank": rank,
                "shard_rank": rank // MACHINE,
                "compression_rate": compression_rate(model, MACHINE, rank),
                "paper_rate": paper_rate,
            }
        )
    return rows
