"""The ways to lay a run over GPUs: what is sharded over which of them, in which bytes a parameter, compressed or not.

A way is what a DeepSpeed JSON says of memory, traffic and time (`deepspeed_json.way_of`).
"""

from dataclasses import dataclass, replace

from dalle_ds.planner.hardware import Hardware

# Over what something is sharded; replicas of a shard, one a machine, are what averages between machines go over.
WHOLE, MACHINE, ALL, REPLICAS = "whole", "machine", "all", "replicas"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many GPUs there are, and what of a run memory and time depend on beside model and way."""

    n_gpus: int
    machine_size: int
    micro_batch: int = 1
    recompute: bool = True
    matrix_rank: int = 0

    @property
    def n_machines(self) -> int:
        return self.n_gpus // self.machine_size

    def group_size(self, scope: str) -> int:
        """How many GPUs share what has this scope."""
        return {WHOLE: 1, MACHINE: self.machine_size, ALL: self.n_gpus, REPLICAS: self.n_machines}[scope]


@dataclass(frozen=True, kw_only=True)
class StateFormat:
    """Bytes that a parameter takes: its weight, an optimizer's float32 copy of it, its gradient buffer, its moments."""

    weight: int
    master: int
    gradient: int
    moments: int


@dataclass(frozen=True, kw_only=True)
class State:
    """Formats of the resblocks' matrices, and of all the rest."""

    matrices: StateFormat
    rest: StateFormat


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sizes in `zero_optimization`, in elements; the defaults are DeepSpeed's.

    Gradients are reduced together until `reduce` is exceeded, out of a buffer of that size if it is `contiguous`.
    Weights are gathered ahead, `prefetch` at a time, until `live` are there, and stay if `reuse` reaches to where they
    are used next.
    """

    reduce: int = 500_000_000
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    contiguous: bool = True


def layer_buckets(dim: int) -> Buckets:
    """For GPUs without memory to spare: of a layer of that width, or of its largest matrix, which has 4 dim^2."""
    matrix = 4 * dim**2
    return Buckets(reduce=matrix, prefetch=matrix, live=3 * matrix, reuse=6 * matrix, contiguous=False)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to lay out a run: `weights`, `gradients` and `optimizer` say over what each is sharded.

    Branches compute in `dtype`; "" is bf16 where a GPU has it, and else fp16. Gradients are scaled by resblock if it
    `is_scaled`. A `compressor` ("powersgd", or "none" for our path without compression) averages gradients between
    machines, or between all GPUs where weights are whole, in the format `wire`; a `matrix_rank` of 0 is the plan's.
    `buckets` of None are those of a layer. Communication hides behind computation if it `overlaps`. The optimizer
    updates all that it has at once, or a resblock at a time if `by_resblock`; if it `offloads`, on the host, where its
    state and the gradients are.
    """

    state: State
    dtype: str = ""
    is_scaled: bool = False
    weights: str = WHOLE
    gradients: str = WHOLE
    optimizer: str = WHOLE
    compressor: str = ""
    wire: str = "full"
    matrix_rank: int = 0
    buckets: Buckets | None = None
    overlaps: bool = True
    by_resblock: bool = False
    offloads: bool = False

    @property
    def compute_bytes(self) -> int:
        """Of an entry of what branches compute."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def is_hierarchical(self) -> bool:
        return self.weights == MACHINE

    @property
    def is_compressed(self) -> bool:
        return self.compressor == "powersgd"

    def dtype_on(self, gpu: Hardware) -> str:
        """What branches compute in there."""
        return self.dtype or ("bf16" if gpu.has_bfloat16 else "fp16")

    def buckets_for(self, dim: int) -> Buckets:
        """The sizes for a model of that width."""
        return self.buckets or layer_buckets(dim)


# DeepSpeed's fp16 and bf16 sections: all parameters in 16 bits, with float32 copies and gradients added up in float32;
# without ZeRO it adds them up in 16 bits.
_HALF = StateFormat(weight=2, master=4, gradient=4, moments=8)
_WHOLE_HALF = StateFormat(weight=2, master=4, gradient=2, moments=8)
STOCK, STOCK_WHOLE = State(matrices=_HALF, rest=_HALF), State(matrices=_WHOLE_HALF, rest=_WHOLE_HALF)
# Section 2.4: what is no matrix stays in 32 bits, and so needs no copy.
_FULL = StateFormat(weight=4, master=0, gradient=4, moments=8)
MIXED = State(matrices=_HALF, rest=_FULL)
SCALED = State(matrices=StateFormat(weight=2, master=4, gradient=4, moments=4), rest=_FULL)
# Weights and gradients in 16 bits without a copy, moments in 1-6-9 and 0-6-10. With PowerSGD gradients are added up in
# its error buffers, which take as much (Appendix E.2).
COMPACT = State(matrices=StateFormat(weight=2, master=0, gradient=2, moments=4), rest=_FULL)
# What the files of ZeRO-3 say: gradients of a layer of 12b together.
_LARGE = Buckets(reduce=200_000_000, contiguous=False)

_ZERO_3 = Way(state=STOCK, buckets=Buckets(), optimizer=ALL, gradients=ALL, weights=ALL)
_OURS = replace(_ZERO_3, by_resblock=True, buckets=_LARGE)
_FP16 = replace(_OURS, state=SCALED, dtype="fp16", is_scaled=True)
_COMPACT = replace(_FP16, state=COMPACT, buckets=None)
_HIERARCHICAL = replace(_COMPACT, optimizer=MACHINE, gradients=MACHINE, weights=MACHINE, compressor="none")

# From the simplest on. Without ZeRO, averaging waits for the end of the backward pass.
WAYS = {
    "ZeRO 0": Way(state=STOCK_WHOLE, buckets=Buckets(), overlaps=False),
    "ZeRO 1": Way(state=STOCK, buckets=Buckets(), optimizer=ALL),
    "ZeRO 2": Way(state=STOCK, buckets=Buckets(), optimizer=ALL, gradients=ALL),
    "ZeRO 3": _ZERO_3,
    "ZeRO 3 bf16": replace(_OURS, state=MIXED, dtype="bf16"),
    "ZeRO 3 fp16": _FP16,
    "ZeRO 3 16-bit state": _COMPACT,
    "hierarchical": _HIERARCHICAL,
    "hierarchical PowerSGD": replace(_HIERARCHICAL, compressor="powersgd", wire="1-6-9"),
}
# ZeRO 1 in bf16: DeepSpeed's BF16_Optimizer, which keeps gradients of 16 bits beside their sums, has no buckets, and
# averages when the backward pass is over.
ZERO_1_BF16 = replace(
    WAYS["ZeRO 1"],
    state=State(matrices=replace(_HALF, gradient=6), rest=replace(_HALF, gradient=6)),
    buckets=Buckets(contiguous=False),
    overlaps=False,
)
# On one GPU these differ.
ON_ONE_GPU = ("ZeRO 0", "ZeRO 3 fp16", "ZeRO 3 16-bit state")


def ways_for(n_gpus: int, machine_size: int, gpu: Hardware) -> dict[str, Way]:
    """The ways that differ there: within one machine there is nothing between machines."""
    ways = WAYS | {"ZeRO 1": ZERO_1_BF16} if gpu.has_bfloat16 else WAYS
    return {
        name: way
        for name, way in ways.items()
        if (n_gpus > 1 or name in ON_ONE_GPU)
        and (n_gpus > machine_size or not way.is_hierarchical)
        and (gpu.has_bfloat16 or way.dtype != "bf16")
    }
