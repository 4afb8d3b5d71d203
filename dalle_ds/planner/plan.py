"""A plan: every way to lay a run over the GPUs that are given, which of them fit, and the one to take."""

from dataclasses import dataclass, replace

from dalle_ds.config import PriorConfig, require
from dalle_ds.planner.arithmetic import training_flops
from dalle_ds.planner.collectives import Links
from dalle_ds.planner.memory import Memory, memory_of
from dalle_ds.planner.parameters import count_parameters, shards_are_whole_rows
from dalle_ds.planner.plan_config import RECOMPUTE, PlanConfig
from dalle_ds.planner.start import Start, start_of
from dalle_ds.planner.step_time import Speeds, StepTime, step_time_of
from dalle_ds.planner.table_1 import default_matrix_rank
from dalle_ds.planner.traffic import Exchange, Payload, exchanges_of, payload_of
from dalle_ds.planner.ways import Layout, Way, ways_for

# Appendix B.2.
PAPER_BATCH, PAPER_UPDATES = 1024, 430_000
# What the way of a DeepSpeed JSON that is given is called.
GIVEN = "the JSON"
# Above as many parameters, training in fp16 without gradient scales by resblock diverged (Section 2.4).
FP16_LIMIT = 10**9
# Steps that differ by less are as fast: the model of time is no better than that.
AS_FAST = 1.05
# Part of a step from which waiting for first bytes is worth a line.
MUCH_WAITING = 0.25


@dataclass(frozen=True, kw_only=True)
class Option:
    """A way with what it takes; `payload` is what a compressor averages, and `start` says how to start it.

    `obstacle` says why it is not to be taken although it may fit.
    """

    name: str
    way: Way
    layout: Layout
    fits: bool
    obstacle: str
    memory: Memory
    exchanges: list[Exchange]
    payload: Payload | None
    time: StepTime
    start: Start | None

    @property
    def sent(self) -> Links:
        """Bytes that a GPU sends in a step."""
        return sum((one.sent(self.layout) * one.times for one in self.exchanges), Links())


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


def make_plan(model: PriorConfig, config: PlanConfig, given: Way | None = None, way: str = "") -> Plan:
    """Works out every way; a `given` one comes first. `way` names the one to show."""
    size = config.machine_size
    rank = config.matrix_rank or default_matrix_rank(model.dim, size)
    require(
        rank % size == 0, f"matrix_rank {rank} is no multiple of {size} GPUs a machine: each shard gets its part of it"
    )
    require(rank <= max(model.dim, size), f"matrix_rank {rank} is more than the model's width {model.dim}: give less")
    ways, n_micro_steps = _choices(model, config, given), _n_micro_steps(config)
    options = [_make_option(model, config, name, one, rank, n_micro_steps) for name, one in ways.items()]
    notes = []
    if not shards_are_whole_rows(model, size):
        notes.append(f"no PowerSGD: width {model.dim} is no multiple of {size} GPUs a machine; change one")
    for obstacle in dict.fromkeys(option.obstacle for option in options if option.obstacle):
        names = [option.name for option in options if option.obstacle == obstacle]
        notes.append(f"{', '.join(names)}: {obstacle}")
    recommended, reason = recommend(options, config)
    shown = options[0] if given is not None else recommended or min(options, key=lambda one: one.memory.total)
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


def _choices(model: PriorConfig, config: PlanConfig, given: Way | None) -> dict[str, Way]:
    """The ways by name, a given one first; without PowerSGD where shards of matrices would be no matrices."""
    size = config.machine_size
    ways = ways_for(config.gpus, size, config.hardware)
    if config.wire:
        ways = {name: replace(one, wire=config.wire) if one.compressor else one for name, one in ways.items()}
    if not shards_are_whole_rows(model, size):
        ways = {name: one for name, one in ways.items() if not one.is_compressed}
    if given is None:
        return ways
    require(
        not given.is_compressed or shards_are_whole_rows(model, size if given.is_hierarchical else 1),
        f"{GIVEN}: PowerSGD needs a width that {size} GPUs a machine divide, not {model.dim}",
    )
    return {GIVEN: given, **ways}


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


def _make_option(model: PriorConfig, config: PlanConfig, name: str, way: Way, rank: int, n_micro_steps: int) -> Option:
    """The option without recomputation where that fits, else with it, as far as the config leaves the choice."""
    layout = Layout(
        n_gpus=config.gpus, machine_size=config.machine_size, micro_batch=config.micro_batch, matrix_rank=rank
    )
    for recompute in RECOMPUTE[config.recompute]:
        layout = replace(layout, recompute=recompute)
        memory = memory_of(model, way, layout)
        fits = memory.total <= config.usable_memory
        if fits:
            break
    exchanges = exchanges_of(model, way, layout, n_micro_steps)
    speeds = Speeds(hardware=config.hardware, efficiency=config.efficiency, link_efficiency=config.link_efficiency)
    is_averaged = way.compressor and config.gpus > layout.group_size(way.weights)
    batch = config.gpus * config.micro_batch * n_micro_steps
    is_stock_fp16 = not way.dtype and not config.hardware.has_bfloat16
    return Option(
        name=name,
        way=way,
        layout=layout,
        fits=fits,
        obstacle=_obstacle(model, way, config),
        memory=memory,
        exchanges=exchanges,
        payload=payload_of(model, way, layout) if is_averaged else None,
        time=step_time_of(model, way, layout, memory, exchanges, speeds, n_micro_steps),
        start=None if name == GIVEN else start_of(name, model.dim, layout, batch, is_stock_fp16),
    )


def _obstacle(model: PriorConfig, way: Way, config: PlanConfig) -> str:
    dtype = way.dtype_on(config.hardware)
    if dtype == "bf16" and not config.hardware.has_bfloat16:
        return f"{config.gpu} has no bfloat16: use fp16"
    if dtype == "fp16" and not way.is_scaled and count_parameters(model).total > FP16_LIMIT:
        return "fp16 without gradient scales by resblock diverges above 10^9 parameters (paper, Section 2.4)"
    return ""


def recommend(options: list[Option], config: PlanConfig) -> tuple[Option | None, str]:
    """Of those that fit and are about as fast as the fastest, one whose file is ready, or else the simplest; and why,
    in a sentence."""
    usable = config.usable_memory / 1e9
    fitting = [option for option in options if option.fits and not option.obstacle]
    if not fitting:
        least = min(options, key=lambda option: (bool(option.obstacle), option.memory.total))
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
    as_fast = [option for option in fitting if option.time.total <= AS_FAST * fastest.time.total]
    # What is given was not chosen for being simple.
    chosen = min(as_fast, key=lambda option: (option.start is None, bool(option.start and option.start.changes)))
    spare = usable - chosen.memory.total / 1e9
    if len(fitting) == 1:
        why = "the only one that fits"
    elif chosen is fastest:
        why = "the fastest that fits"
    else:
        why = f"fits, and is within 5% of the fastest ({fastest.name})"
    return chosen, f"{chosen.name}: {why}; {spare:.1f} GB to spare"
