"""Our own sections of a DeepSpeed JSON: 16-bit storage, gradient scales, sharding inside machines, compression.

DeepSpeed accepts sections that it does not know in silence, so they are taken out and checked here. What each is for,
and which go together, is in ds_configs/README.md.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

import torch

from dalle_ds.config import InputError, require
from dalle_ds.training.gradient_scales import ScalingOptions
from dalle_kernels.compression import COMPRESSORS, Compressor, PowerSGDOptions

STAGES_THAT_COMPRESS = (0, 1, 3)


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """Matrices of resblocks in the 16-bit dtype that fp16 or bf16 enables, everything else in float32 (Section 2.4).

    At stage 3 they are stored so, with a float32 copy that the optimizer updates or, without `master_weights`, alone;
    at lower stages weights are stored in float32, and cast where they are used.
    """

    master_weights: bool = True


@dataclass(frozen=True, kw_only=True)
class HierarchicalSharding:
    """ZeRO-3 inside machines of `machine_size` ranks; machines hold replicas (Section 2.5)."""

    machine_size: int

    def __post_init__(self) -> None:
        require(self.machine_size >= 1, f"machine_size {self.machine_size} must be at least 1, e.g. 8")


@dataclass(frozen=True, kw_only=True)
class Scaling(ScalingOptions):
    """Per-resblock gradient scaling, and what gradients are divided by before they are summed inside a machine.

    The sum is in the gradients' own dtype. `divisor` 0 takes the number of ranks that are summed: what does not
    overflow on one rank then cannot overflow in the sum. Smaller ones lose less at the lower end; histograms of
    gradients (`--histogram_every`) show what there is room for (Appendix D).
    """

    divisor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.divisor >= 0, f"divisor {self.divisor} must not be negative; 0 takes the number of ranks")


@dataclass(frozen=True, kw_only=True)
class Sections:
    """All of them; None where one is not there."""

    mixed_precision: MixedPrecision | None = None
    resblock_gradient_scaling: Scaling | None = None
    hierarchical_sharding: HierarchicalSharding | None = None
    gradient_compression: dict[str, Any] | None = None

    @property
    def is_any(self) -> bool:
        return any(getattr(self, field.name) is not None for field in dataclasses.fields(self))

    @property
    def is_mixed(self) -> bool:
        """Whether precision is ours: gradient scales imply it."""
        return self.mixed_precision is not None or self.resblock_gradient_scaling is not None

    @property
    def master_weights(self) -> bool:
        return self.mixed_precision is None or self.mixed_precision.master_weights

    @property
    def machine_size(self) -> int | None:
        return None if self.hierarchical_sharding is None else self.hierarchical_sharding.machine_size

    def make_compressor(self, n_shards: int, ordinal: int, *, buffers: str) -> Compressor:
        """For one shard of `n_shards`; `buffers` is the format in which gradients add up that are not compressed."""
        options = dict(self.gradient_compression or {"type": "none"})
        kind = options.pop("type")
        if kind == "none":
            return COMPRESSORS[kind](buffers=buffers, **options)
        # Shards are compressed each for itself (footnote 9), from different Q.
        seed = options.pop("seed", 0) * n_shards + ordinal
        return COMPRESSORS[kind](n_shards=n_shards, seed=seed, **options)


def take_sections(config: dict[str, Any], where: str) -> tuple[Sections, dict[str, Any]]:
    """(our sections, what is left for DeepSpeed) of a DeepSpeed JSON.

    Raises InputError, naming section, key and remedy, for unknown keys, values of the wrong kind, and combinations that
    do not work.
    """
    made: dict[str, Any] = {}
    for name, kind in _SECTIONS.items():
        if name in config:
            made[name] = _make(kind, config[name], f"{where}: {name}")
    if "gradient_compression" in config:
        made["gradient_compression"] = _check_compression(
            config["gradient_compression"], f"{where}: gradient_compression"
        )
    rest = {name: value for name, value in config.items() if name not in OWN_SECTIONS}
    sections = Sections(**{name: value for name, value in made.items() if value is not None})
    if sections.is_any:
        _check_together(sections, rest, where)
    return sections, rest


def sixteen_bit_dtype(config: dict[str, Any]) -> torch.dtype:
    """What the JSON's fp16 and bf16 sections enable; float32 where neither does."""
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        if config.get(name, {}).get("enabled"):
            return dtype
    return torch.float32


def _make(kind: Any, values: Any, where: str) -> Any:
    """The section as its dataclass, or None where it says `"enabled": false`."""
    require(isinstance(values, dict), f"{where} must be an object")
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    values = dict(values)
    enabled = values.pop("enabled", True)
    require(isinstance(enabled, bool), f"{where}.enabled {enabled!r} must be true or false")
    for key, value in values.items():
        require(key in known, f"{where}: unknown key {key!r}; known keys are {sorted([*known, 'enabled'])}")
        wanted = (int, float) if hints[key] is float else hints[key]
        fits = isinstance(value, wanted) and (hints[key] is bool or not isinstance(value, bool))
        require(fits, f"{where}.{key} {value!r} must be {KIND_NAMES[hints[key]]}")
    for field in dataclasses.fields(kind):
        is_needed = field.default is dataclasses.MISSING
        require(not is_needed or field.name in values, f"{where}.{field.name} is missing")
    if not enabled:
        return None
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_compression(values: Any, where: str) -> dict[str, Any] | None:
    require(isinstance(values, dict), f"{where} must be an object")
    options = dict(values)
    if not options.pop("enabled", True):
        return None
    kind = str(options.get("type"))
    require(kind in COMPRESSORS, f"{where}.type {kind!r} is unknown; known are {', '.join(COMPRESSORS)}")
    known = {
        "powersgd": {field.name for field in dataclasses.fields(PowerSGDOptions)} - {"n_shards"},
        "none": {"wire", "scale"},
    }[kind]
    unknown = sorted(set(options) - known - {"type"})
    require(not unknown, f"{where}: unknown key {unknown[0] if unknown else ''!r}; known keys are {sorted(known)}")
    try:
        COMPRESSORS[kind](**{key: value for key, value in options.items() if key != "type"})
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from None
    return options


def _check_together(sections: Sections, config: dict[str, Any], where: str) -> None:
    """Raises InputError for combinations that would not do what they say."""
    zero = config.get("zero_optimization", {})
    stage, dtype = int(zero.get("stage", 0)), sixteen_bit_dtype(config)
    optimizer = config.get("optimizer", {}).get("type")
    scaling, compression = sections.resblock_gradient_scaling, sections.gradient_compression
    autocast = config.get("torch_autocast", {}).get("enabled")
    require(not autocast, f"{where}: torch_autocast and our own sections exclude each other: enable fp16 or bf16")
    require(
        "communication_data_type" not in config,
        f"{where}: communication_data_type has no place here: gradients travel in the dtype of their parameter",
    )
    for name in ("offload_optimizer", "offload_param"):
        is_off = zero.get(name, {}).get("device", "none") == "none"
        require(is_off, f"{where}: zero_optimization.{name} does not go with our own sections: leave one of them out")
    if scaling is not None and dtype == torch.float16:
        loss_scale = config["fp16"].get("loss_scale", 0)
        require(
            loss_scale == 1,
            f"{where}: fp16.loss_scale {loss_scale!r} must be 1 beside resblock_gradient_scaling: one scales, not both",
        )
    if stage < SHARDED_WEIGHTS and dtype == torch.float16 and sections.is_any:
        require(
            scaling is not None,
            f"{where}: mixed precision in fp16 at stage {stage} needs resblock_gradient_scaling: or use bf16, or 3",
        )
    require(
        stage == SHARDED_WEIGHTS or sections.hierarchical_sharding is None,
        f"{where}: hierarchical_sharding shards parameters: set zero_optimization.stage to 3",
    )
    if not sections.master_weights:
        require(
            stage == SHARDED_WEIGHTS, f"{where}: mixed_precision.master_weights false needs zero_optimization.stage 3"
        )
        require(
            optimizer == "CompactAdamW" or dtype == torch.float32,
            f"{where}: mixed_precision.master_weights false needs optimizer.type CompactAdamW, which rounds weights",
        )
    if compression is not None:
        stages = " or ".join(map(str, STAGES_THAT_COMPRESS))
        require(
            stage in STAGES_THAT_COMPRESS,
            f"{where}: gradient_compression cannot serve ZeRO {stage}, which averages every micro-step: use {stages}",
        )
        require(
            stage < SHARDED_WEIGHTS or sections.hierarchical_sharding is not None,
            f"{where}: gradient_compression works between machines: add hierarchical_sharding with its machine_size, "
            "or use stage 0 or 1",
        )
        rank, size = compression.get("matrix_rank", 0), sections.machine_size or 1
        require(
            rank % size == 0,
            f"{where}: gradient_compression.matrix_rank {rank} must be a multiple of machine_size {size}",
        )
        require(
            stage == SHARDED_WEIGHTS or dtype == torch.float32 or sections.is_mixed,
            f"{where}: gradient_compression at stage {stage} in 16 bits needs the section mixed_precision",
        )


SHARDED_WEIGHTS = 3  # ZeRO stage
KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number"}
_SECTIONS = {
    "mixed_precision": MixedPrecision,
    "resblock_gradient_scaling": Scaling,
    "hierarchical_sharding": HierarchicalSharding,
}
OWN_SECTIONS = {*_SECTIONS, "gradient_compression"}
