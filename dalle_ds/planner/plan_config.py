"""What `dalle-ds plan` is asked: the machines, and what of a run no file says."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from dalle_ds.config import described, require
from dalle_ds.planner.hardware import GPUS, Hardware
from dalle_ds.planner.traffic import WIRE_BYTES

RECOMPUTE = {"auto": (False, True), "true": (True,), "false": (False,)}
# Field of PlanConfig -> field of Hardware, and its unit.
REPLACED = {
    "memory_gb": ("memory", 1e9),
    "tflops": ("flops", 1e12),
    "memory_bandwidth": ("memory_bandwidth", 1e9),
    "machine_bandwidth": ("machine_bandwidth", 1e9),
    "network_bandwidth": ("network_bandwidth", 1e9),
}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """0 takes what the catalogue or the paper has."""

    gpus: int = described(8, "GPUs in all")
    gpus_per_machine: int = described(8, "GPUs of a machine, over which hierarchical sharding goes")
    gpu: str = described("h100-80gb", f"what they are: {', '.join(GPUS)}")
    memory_gb: float = described(0.0, "memory of a GPU, in 10^9 bytes; 0 for that of --gpu")
    tflops: float = described(0.0, "peak of its 16-bit products, in 10^12 operations a second; 0 for that of --gpu")
    memory_bandwidth: float = described(0.0, "GB/s that a GPU reads and writes in its memory; 0 for that of --gpu")
    machine_bandwidth: float = described(0.0, "GB/s that a GPU sends inside its machine; 0 for that of --gpu")
    network_bandwidth: float = described(0.0, "GB/s that a GPU sends to other machines; 0 for that of --gpu")
    micro_batch: int = described(1, "samples of a GPU at a time")
    batch: int = described(0, "samples of a step; 0 for the paper's 1,024, or one micro-batch a GPU where that is more")
    matrix_rank: int = described(0, "PowerSGD's rank of a whole matrix; 0 for the paper's, or a quarter of the width")
    wire: str = described("", f"format between machines, instead of each way's own: {', '.join(WIRE_BYTES)}")
    recompute: str = described("auto", "true, false, or auto: recompute activations where memory asks for it")
    efficiency: float = described(0.4, "part of the peak that products reach")
    link_efficiency: float = described(0.8, "part of their bandwidth that links reach in collectives")
    reserve: float = described(0.05, "part of the memory left to CUDA, NCCL and fragmentation")

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_machine", "micro_batch"):
            require(getattr(self, name) >= 1, f"{name} {getattr(self, name)} must be at least 1")
        for name in (*REPLACED, "batch", "matrix_rank"):
            value = getattr(self, name)
            require(
                value >= 0 and math.isfinite(value),
                f"{name} {value} must be a number of at least 0; 0 for the usual one",
            )
        for name, choices in (("gpu", GPUS), ("wire", ("", *WIRE_BYTES)), ("recompute", RECOMPUTE)):
            require(getattr(self, name) in choices, f"{name} {getattr(self, name)!r} must be {_either(choices)}")
        for name in ("efficiency", "link_efficiency"):
            require(0 < getattr(self, name) <= 1, f"{name} {getattr(self, name)} must lie in (0, 1]")
        require(0 <= self.reserve < 1, f"reserve {self.reserve} must lie in [0, 1)")
        require(
            self.gpus <= self.gpus_per_machine or self.gpus % self.gpus_per_machine == 0,
            f"gpus {self.gpus} is no multiple of gpus_per_machine {self.gpus_per_machine}: give whole machines",
        )

    @property
    def machine_size(self) -> int:
        return min(self.gpus, self.gpus_per_machine)

    @property
    def hardware(self) -> Hardware:
        given = {place: unit * getattr(self, name) for name, (place, unit) in REPLACED.items() if getattr(self, name)}
        return dataclasses.replace(GPUS[self.gpu], **given)

    @property
    def usable_memory(self) -> float:
        return self.hardware.memory * (1 - self.reserve)


def _either(choices: Iterable[str]) -> str:
    *most, last = filter(None, choices)
    return f"{', '.join(most)} or {last}"
