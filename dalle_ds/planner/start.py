"""How to start the run of a plan: the file of ds_configs/, what to change in a copy of it, and the flags."""

from dataclasses import dataclass

from dalle_ds.planner.table_1 import RANKS
from dalle_ds.planner.ways import Layout, layer_buckets

STOCK_FP16 = 'say "fp16": {"enabled": true} for bf16'
NO_SECTION = "leave out mixed_precision"


@dataclass(frozen=True, kw_only=True)
class ReadyFile:
    """A file of ds_configs/ with the sizes that it sets, 0 where it sets none; its buckets are those of width `dim`."""

    name: str
    dim: int = 0
    batch: int = 1024
    micro_batch: int = 1
    machine_size: int = 0
    matrix_rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Start:
    """The file, and what to do to a copy of it before it starts the run: nothing, if it does so as it is."""

    file: str
    changes: tuple[str, ...]


BF16 = ReadyFile(name="zero3_bf16.json")
FP16 = ReadyFile(name="zero3_fp16.json")
ONE_GPU = ReadyFile(name="one_gpu_fp16.json", dim=3968, batch=128)
POWERSGD = tuple(
    ReadyFile(name=f"hierarchical_fp16_rank{rank}.json", dim=dim, machine_size=8, matrix_rank=rank)
    for dim, rank in RANKS.items()
)
# Name of a way -> the files that start it, of which the one of the nearest rank is taken, and what to change in them.
READY: dict[str, tuple[tuple[ReadyFile, ...], tuple[str, ...]]] = {
    "ZeRO 0": ((BF16,), (NO_SECTION, "leave out data_types", 'set zero_optimization to {"stage": 0}')),
    "ZeRO 1": ((BF16,), (NO_SECTION, 'set zero_optimization to {"stage": 1, "overlap_comm": true}')),
    "ZeRO 2": ((BF16,), (NO_SECTION, 'set zero_optimization to {"stage": 2, "overlap_comm": true}')),
    "ZeRO 3": ((BF16,), (NO_SECTION, 'set zero_optimization to {"stage": 3}')),
    "ZeRO 3 bf16": ((BF16,), ()),
    "ZeRO 3 fp16": ((FP16,), ()),
    "ZeRO 3 16-bit state": ((ONE_GPU,), ()),
    "hierarchical": (POWERSGD, ("leave out gradient_compression",)),
    "hierarchical PowerSGD": (POWERSGD, ()),
}


def start_of(name: str, dim: int, layout: Layout, batch: int, is_stock_fp16: bool) -> Start:
    """How to start the way of that name in `WAYS`, for a model of width `dim` and steps of `batch` samples."""
    files, changes = READY[name]
    file = min(files, key=lambda one: abs(one.matrix_rank - layout.matrix_rank))
    wanted = {
        "train_micro_batch_size_per_gpu": (file.micro_batch, layout.micro_batch),
        "train_batch_size": (file.batch, batch),
        "machine_size": (file.machine_size, file.machine_size and layout.machine_size),
        "matrix_rank": (file.matrix_rank, 0 if changes else file.matrix_rank and layout.matrix_rank),
    }
    if file.dim not in (0, dim):
        buckets = layer_buckets(dim)
        wanted |= {
            "reduce_bucket_size": (0, buckets.reduce),
            "stage3_prefetch_bucket_size": (0, buckets.prefetch),
            "stage3_max_live_parameters": (0, buckets.live),
            "stage3_max_reuse_distance": (0, buckets.reuse),
        }
    is_overlapped = file is not ONE_GPU or layout.n_gpus == 1
    return Start(
        file=file.name,
        changes=(
            *((STOCK_FP16,) if is_stock_fp16 else ()),
            *changes,
            *(() if is_overlapped else ("set overlap_comm to true",)),
            *(f"set {key} to {value}" for key, (has, value) in wanted.items() if value and value != has),
        ),
    )
