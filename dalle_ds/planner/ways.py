"""The ways to lay a run over GPUs: what is sharded over which GPUs, in which bytes a parameter, compressed or not."""

from dataclasses import dataclass

# Over what something is sharded.
WHOLE, MACHINE, ALL = "whole", "machine", "all"


@dataclass(frozen=True, kw_only=True)
class StateFormat:
    """Bytes that a parameter takes: its weight, an optimizer's float32 copy of it, its gradient buffer, two moments."""

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
class Way:
    """A way to lay out a run; `weights`, `gradients` and `optimizer` say over what each is sharded.

    With `errors_hold_gradients` (Appendix E.2) gradients of compressed matrices are accumulated into their error
    buffers, of `error_bytes` an entry, so that they need no gradient buffer. `compute_bytes` is an entry of what the
    branches compute in.
    """

    state: State
    compute_bytes: int = 2
    weights: str = WHOLE
    gradients: str = WHOLE
    optimizer: str = WHOLE
    is_compressed: bool = False
    error_bytes: int = 2
    errors_hold_gradients: bool = True

    def group_size(self, scope: str, n_gpus: int, machine_size: int) -> int:
        """How many GPUs share what has this scope."""
        return {WHOLE: 1, MACHINE: machine_size, ALL: n_gpus}[scope]

    @property
    def is_hierarchical(self) -> bool:
        return self.weights == MACHINE


_HALF = StateFormat(weight=2, master=4, gradient=4, moments=8)
# DeepSpeed's fp16 and bf16 sections: all parameters in 16 bits, with float32 copies and gradients added up in float32.
STOCK = State(matrices=_HALF, rest=_HALF)
# Without ZeRO, DeepSpeed adds gradients up in 16 bits.
_WHOLE_HALF = StateFormat(weight=2, master=4, gradient=2, moments=8)
STOCK_WHOLE = State(matrices=_WHOLE_HALF, rest=_WHOLE_HALF)
# Section 2.4: 16-bit weights and gradients without a copy, moments in 1-6-9 and 0-6-10; all the rest in 32 bits.
COMPACT = State(
    matrices=StateFormat(weight=2, master=0, gradient=2, moments=4),
    rest=StateFormat(weight=4, master=0, gradient=4, moments=8),
)

# From the simplest on: of two that are as fast, the earlier is the better.
WAYS = {
    "ZeRO 0": Way(state=STOCK_WHOLE),
    "ZeRO 1": Way(state=STOCK, optimizer=ALL),
    "ZeRO 2": Way(state=STOCK, optimizer=ALL, gradients=ALL),
    "ZeRO 3": Way(state=STOCK, optimizer=ALL, gradients=ALL, weights=ALL),
    "ZeRO 3 16-bit state": Way(state=COMPACT, optimizer=ALL, gradients=ALL, weights=ALL),
    "hierarchical": Way(state=COMPACT, optimizer=MACHINE, gradients=MACHINE, weights=MACHINE),
    "hierarchical PowerSGD": Way(
        state=COMPACT, optimizer=MACHINE, gradients=MACHINE, weights=MACHINE, is_compressed=True
    ),
}
ONE_GPU = {"ZeRO 0": WAYS["ZeRO 0"], "16-bit state": Way(state=COMPACT)}


def ways_for(n_gpus: int, machine_size: int) -> dict[str, Way]:
    """The ways that differ on so many GPUs: on one machine there is nothing between machines."""
    if n_gpus == 1:
        return ONE_GPU
    return {name: way for name, way in WAYS.items() if n_gpus > machine_size or not way.is_hierarchical}
