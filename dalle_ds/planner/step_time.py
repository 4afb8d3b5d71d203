"""How long a step takes, by a model that is stated here and nowhere measured.

Products run at `efficiency` of the peak, links at `link_efficiency` of theirs. What is sent takes bytes / bandwidth +
latency, inside and between machines at once. It hides behind the computation of its own pass: gathers of the forward
pass behind that, gathers and scatters of the backward pass behind that, averages between machines behind the backward
pass of the last micro-step (Appendix E.2); only what is longer adds to the step. What does not hide: ZeRO 0's average
of gradients, the updated weights of ZeRO 1 and 2, compression's own products, which run in float32, and the optimizer,
which reads and writes all state once. `one_after_the_other` is the step with nothing hidden.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dalle_ds.config import PriorConfig
from dalle_ds.planner.arithmetic import training_flops
from dalle_ds.planner.hardware import Hardware
from dalle_ds.planner.memory import Layout, Memory
from dalle_ds.planner.parameters import layer_matrices, shard_shape
from dalle_ds.planner.traffic import WHEN, Exchange
from dalle_ds.planner.ways import Way

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step; `inside` and `between` are all of that communication, of which `exposed` does not hide."""

    forward: float
    backward: float
    inside: float
    between: float
    exposed: float
    compression: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.exposed + self.compression + self.optimizer

    @property
    def one_after_the_other(self) -> float:
        return self.total - self.exposed + self.inside + self.between


def step_time_of(
    config: PriorConfig,
    way: Way,
    layout: Layout,
    memory: Memory,
    exchanges: Sequence[Exchange],
    speeds: "Speeds",
    n_micro_steps: int,
) -> StepTime:
    """The time of a step of `n_micro_steps` micro-batches on each GPU."""
    flops, hardware = training_flops(config), speeds.hardware
    rate = speeds.efficiency * (hardware.flops if way.compute_bytes < FLOAT32_BYTES else hardware.flops_32)
    forward = layout.micro_batch * flops.forward() / rate
    backward = layout.micro_batch * flops.backward(layout.recompute) / rate
    times = {when: speeds.of(one for one in exchanges if one.when == when) for when in WHEN}
    # The links of a machine and the network work at once.
    last = max(a + b for a, b in zip(times["backward"], times["last backward"], strict=True))
    exposed = (
        n_micro_steps * max(0.0, max(times["forward"]) - forward)
        + (n_micro_steps - 1) * max(0.0, max(times["backward"]) - backward)
        + max(0.0, last - backward)
        + max(times["end"])
    )
    repeated = [one for one in exchanges for _ in range(one.times)]
    inside, between = speeds.of(repeated)
    flops_32 = compression_flops(config, layout) if way.is_compressed else 0
    return StepTime(
        forward=n_micro_steps * forward,
        backward=n_micro_steps * backward,
        inside=inside,
        between=between,
        exposed=exposed,
        compression=flops_32 / (speeds.efficiency * hardware.flops_32),
        optimizer=2 * memory.state / hardware.memory_bandwidth,
    )


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a GPU and its links reach."""

    hardware: Hardware
    efficiency: float
    link_efficiency: float

    def of(self, exchanges: Iterable[Exchange]) -> tuple[float, float]:
        """Seconds that each of these takes once, one after the other: (inside machines, between machines)."""
        chosen, hardware = list(exchanges), self.hardware
        inside = sum(one.inside for one in chosen) / (self.link_efficiency * hardware.machine_bandwidth)
        between = sum(one.between for one in chosen) / (self.link_efficiency * hardware.network_bandwidth)
        return (
            inside + sum(one.inside_latency for one in chosen),
            between + sum(one.between_latency for one in chosen),
        )


def compression_flops(config: PriorConfig, layout: Layout) -> int:
    """Operations of a GPU for P, Q and their product, and for making P orthonormal."""
    total = 0
    for shape in layer_matrices(config):
        shard = shard_shape(shape, layout.machine_size)
        rank = min(layout.matrix_rank // layout.machine_size, *shard)
        # Householder reflections and the product that they make, of min(shard) x rank: 2 n r^2 each.
        total += 3 * 2 * math.prod(shard) * rank + 4 * min(shard) * rank**2
    return total * config.n_layer
