"""A plan: every way to lay a run over the GPUs that are given, which of them fit, and the one to take."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dalle_ds.config import PriorConfig, described, require
from dalle_ds.planner.arithmetic import training_flops
from dalle_ds.planner.deepspeed_json import JsonSettings
from dalle_ds.planner.hardware import GPUS, Hardware
from dalle_ds.planner.memory import Layout, Memory, memory_of
from dalle_ds.planner.parameters import count_parameters, shards_are_whole_rows
from dalle_ds.planner.step_time import Speeds, StepTime, step_time_of
from dalle_ds.planner.traffic import (
    WIRE_BYTES,
    Exchange,
    Payload,
    bytes_between_machines,
    compression_rate,
    exchanges_of,
)
from dalle_ds.planner.ways import Way, ways_for

# Appendix B.2.
PAPER_BATCH, PAPER_UPDATES = 1024, 430_000
# Table 1: width -> matrix rank.
TABLE_1 = {1920: 512, 2688: 640, 3968: 896}
TABLE_1_RATES = (0.83, 0.85, 0.86)
TABLE_1_MACHINE = 8
# Table 1 has 0.23 to 0.27.
RANK_TO_WIDTH = 0.25
# Steps that differ by less are as fast: the model of time is no better than that.
AS_FAST = 1.05
RECOMPUTE = {"auto": (False, True), "true": (True,), "false": (False,)}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The machines, and what of the run is not in the DeepSpeed JSON; 0 takes what the catalogue or the paper has."""

    gpus: int = described(8, "GPUs in all")
    gpus_per_machine: int = described(8, "GPUs of a machine, over which hierarchical sharding goes")
    gpu: str = described("h100-80gb", f"what they are: {', '.join(GPUS)}")
    memory_gb: float = described(0.0, "memory of a GPU, in 10^9 bytes; 0 for that of --gpu")
    tflops: float = described(0.0, "peak of its 16-bit products, in 10^12 operations a second; 0 for that of --gpu")
    machine_bandwidth: float = described(0.0, "GB/s that a GPU sends inside its machine; 0 for that of --gpu")
    network_bandwidth: float = described(0.0, "GB/s that a GPU sends to other machines; 0 for that of --gpu")
    micro_batch: int = described(1, "samples of a GPU at a time")
    batch: int = described(0, "samples of a step; 0 for the paper's 1,024, or one micro-batch a GPU where that is more")
    matrix_rank: int = described(0, "PowerSGD's rank of a whole matrix; 0 for the paper's, or a quarter of the width")
    wire: str = described("1-6-9", f"format between machines: {', '.join(WIRE_BYTES)}")
    recompute: str = described("auto", "true, false, or auto: recompute activations where memory asks for it")
    efficiency: float = described(0.4, "part of the peak that products reach")
    link_efficiency: float = described(0.8, "part of their bandwidth that links reach in collectives")
    reserve: float = described(0.05, "part of the memory left to CUDA, NCCL and fragmentation")

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_machine", "micro_batch"):
            require(getattr(self, name) >= 1, f"{name} {getattr(self, name)} must be at least 1")
        for name in ("memory_gb", "tflops", "machine_bandwidth", "network_bandwidth", "batch", "matrix_rank"):
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)} must not be negative; 0 for the usual one")
        for name, choices in (("gpu", GPUS), ("wire", WIRE_BYTES), ("recompute", RECOMPUTE)):
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
        changes: dict[str, Any] = {
            "memory": self.memory_gb * 1e9,
            "flops": self.tflops * 1e12,
            "machine_bandwidth": self.machine_bandwidth * 1e9,
            "network_bandwidth": self.network_bandwidth * 1e9,
        }
        return dataclasses.replace(GPUS[self.gpu], **{name: value for name, value in changes.items() if value})

    @property
    def usable_memory(self) -> float:
        return self.hardware.memory * (1 - self.reserve)


@dataclass(frozen=True, kw_only=True)
class Option:
    """A way with what it takes; `payload` is what counters count between machines, where sharding is hierarchical."""

    name: str
    way: Way
    layout: Layout
    fits: bool
    memory: Memory
    exchanges: list[Exchange]
    payload: Payload | None
    time: StepTime

    @property
    def inside_bytes(self) -> float:
        return sum(one.times * one.inside for one in self.exchanges)

    @property
    def between_bytes(self) -> float:
        return sum(one.times * one.between for one in self.exchanges)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All options, the one to take (none where none fits) with the reason, and the one whose details are shown."""

    config: PlanConfig
    model: PriorConfig
    n_micro_steps: int
    matrix_rank: int
    options: list[Option]
    recommended: Option | None
    reason: str
    shown: Option
    notes: list[str]

    @property
    def batch(self) -> int:
        return self.config.gpus * self.config.micro_batch * self.n_micro_steps

    @property
    def samples_per_second(self) -> float:
        return self.batch / self.shown.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: without those of recomputation."""
        peak = self.config.gpus * self.config.hardware.flops
        return self.samples_per_second * training_flops(self.model).model / peak

    @property
    def paper_run_days(self) -> float:
        """For as many samples as the paper's 430,000 updates of 1,024 had."""
        return PAPER_UPDATES * PAPER_BATCH / self.samples_per_second / 86_400


def make_plan(model: PriorConfig, config: PlanConfig, settings: JsonSettings | None = None, way: str = "") -> Plan:
    """Works out every way; that of a DeepSpeed JSON comes first. `way` names the one to show."""
    machine_size = config.machine_size
    n_micro_steps = _n_micro_steps(config)
    is_aligned = shards_are_whole_rows(model, machine_size)
    rank = config.matrix_rank or default_matrix_rank(model.dim, machine_size)
    require(
        rank % machine_size == 0,
        f"matrix_rank {rank} is no multiple of {machine_size} GPUs a machine: each shard gets its part of it",
    )
    ways = ways_for(config.gpus, machine_size)
    notes = []
    if not is_aligned:
        ways = {name: way for name, way in ways.items() if not way.is_compressed}
        notes.append(f"no PowerSGD: width {model.dim} is no multiple of {machine_size} GPUs a machine; change one")
    if settings is not None:
        require(
            is_aligned or not settings.way.is_compressed,
            f"{settings.name}: PowerSGD needs a width that {machine_size} GPUs a machine divide, not {model.dim}",
        )
        ways = {settings.name: settings.way, **ways}
        if settings.in_bfloat16 and not config.hardware.has_bfloat16:
            notes.append(f"{config.gpu} has no bfloat16: use fp16 instead of {settings.name}")
    options = []
    for name, one in ways.items():
        buckets = (
            {"live_elements": settings.live_elements, "bucket_elements": settings.bucket_elements}
            if settings is not None and name == settings.name
            else {}
        )
        options.append(_make_option(model, config, name, one, rank, n_micro_steps, buckets))
    recommended, reason = _recommend(options, config)
    shown = options[0] if settings is not None else recommended or min(options, key=lambda one: one.memory.total)
    if way:
        require(way in ways, f"--way {way!r} is none of this run's: {', '.join(ways)}")
        shown = next(option for option in options if option.name == way)
    return Plan(
        config=config,
        model=model,
        n_micro_steps=n_micro_steps,
        matrix_rank=rank,
        options=options,
        recommended=recommended,
        reason=reason,
        shown=shown,
        notes=notes,
    )


def default_matrix_rank(dim: int, machine_size: int) -> int:
    """Table 1's rank for its widths, else a quarter of the width; rounded up to a multiple of the machine's GPUs."""
    rank = TABLE_1.get(dim, round(dim * RANK_TO_WIDTH))
    return max(1, -(-rank // machine_size)) * machine_size


def _n_micro_steps(config: PlanConfig) -> int:
    at_once = config.gpus * config.micro_batch
    if not config.batch:
        return -(-PAPER_BATCH // at_once)
    require(
        config.batch % at_once == 0,
        f"batch {config.batch} is no multiple of {config.gpus} GPUs x micro_batch {config.micro_batch}: "
        f"give e.g. {max(1, round(config.batch / at_once)) * at_once}",
    )
    return config.batch // at_once


def _make_option(
    model: PriorConfig, config: PlanConfig, name: str, way: Way, rank: int, n_micro_steps: int, buckets: dict[str, int]
) -> Option:
    """The option without recomputation where that fits, else with it, as far as the config leaves the choice."""
    for recompute in RECOMPUTE[config.recompute]:
        layout = Layout(
            n_gpus=config.gpus,
            machine_size=config.machine_size,
            micro_batch=config.micro_batch,
            recompute=recompute,
            matrix_rank=rank,
            **buckets,
        )
        memory = memory_of(model, way, layout)
        fits = memory.total <= config.usable_memory
        if fits:
            break
    exchanges = exchanges_of(model, way, layout, n_micro_steps, config.wire)
    payload = None
    if way.is_hierarchical and layout.n_machines > 1:
        sent_rank = rank if way.is_compressed else 0
        payload = bytes_between_machines(model, layout.machine_size, layout.n_machines, sent_rank, config.wire)
    speeds = Speeds(hardware=config.hardware, efficiency=config.efficiency, link_efficiency=config.link_efficiency)
    time = step_time_of(model, way, layout, memory, exchanges, speeds, n_micro_steps)
    return Option(
        name=name,
        way=way,
        layout=layout,
        fits=fits,
        memory=memory,
        exchanges=exchanges,
        payload=payload,
        time=time,
    )


def _recommend(options: list[Option], config: PlanConfig) -> tuple[Option | None, str]:
    """Of those that fit and are about as fast as the fastest, the simplest; and why, in a sentence."""
    fitting = [option for option in options if option.fits]
    usable = config.usable_memory / 1e9
    if not fitting:
        least = min(options, key=lambda option: option.memory.total)
        ways_out = ["GPUs with more memory"]
        if config.gpus == config.machine_size:
            ways_out.append("more GPUs")
        if config.micro_batch > 1:
            ways_out.append("a smaller micro-batch")
        return None, (
            f"nothing fits {usable:.1f} GB: {least.name} takes the least, {least.memory.total / 1e9:.1f} GB a GPU; "
            f"try {' or '.join(ways_out)}"
        )
    fastest = min(fitting, key=lambda option: option.time.total)
    chosen = next(option for option in fitting if option.time.total <= AS_FAST * fastest.time.total)
    spare = usable - chosen.memory.total / 1e9
    if len(options) == 1 or len(fitting) == 1:
        why = "the only one that fits"
    elif chosen is fastest:
        why = "the fastest that fits"
    else:
        why = f"the simplest of those that fit within 5% of the fastest ({fastest.name})"
    return chosen, f"{chosen.name}: {why}; {spare:.1f} GB to spare"


def _either(choices: Iterable[str]) -> str:
    *most, last = choices
    return f"{', '.join(most)} or {last}"


def table_1() -> list[dict[str, float]]:
    """The paper's Table 1 from our closed forms: 64 layers, heads of 64, 8 GPUs a machine."""
    rows = []
    for (dim, rank), paper_rate in zip(TABLE_1.items(), TABLE_1_RATES, strict=True):
        model = PriorConfig(n_head=dim // 64)
        rows.append(
            {
                "parameters": count_parameters(model).matrices,
                "dim": dim,
                "matrix_rank": rank,
                "shard_rank": rank // TABLE_1_MACHINE,
                "compression_rate": compression_rate(model, TABLE_1_MACHINE, rank),
                "paper_rate": paper_rate,
            }
        )
    return rows
