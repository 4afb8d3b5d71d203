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
from dalle_ds.training.optimizer import CompactAdamW
from dalle_kernels.compression import COMPRESSORS, Compressor, NoCompressionOptions, Options, PowerSGDOptions

STAGES_THAT_COMPRESS = (0, 1, 3)
# Fields of compressors' options that follow from the rest of the JSON.
GIVEN = ("n_shards", "buffers")


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
class Compression:
    """Which compressor averages gradients between machines, and its settings (Appendix E)."""

    type: str
    options: Options


@dataclass(frozen=True, kw_only=True)
class Sections:
    """All of them; None where one is not there."""

    mixed_precision: MixedPrecision | None = None
    resblock_gradient_scaling: ScalingOptions | None = None
    hierarchical_sharding: HierarchicalSharding | None = None
    gradient_compression: Compression | None = None

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
        chosen = self.gradient_compression or Compression(type="none", options=NoCompressionOptions())
        return COMPRESSORS[chosen.type].make(chosen.options.for_shard(n_shards, ordinal, buffers))


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
        made["gradient_compression"] = _make_compression(
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
    known = [field.name for field in dataclasses.fields(kind) if field.name not in GIVEN]
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
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _make_compression(values: Any, where: str) -> Compression | None:
    require(isinstance(values, dict), f"{where} must be an object")
    if values.get("enabled") is False:
        return None
    kind, rest = str(values.get("type")), {key: value for key, value in values.items() if key != "type"}
    require(kind in COMPRESSORS, f"{where}.type {kind!r} is unknown; known are {', '.join(COMPRESSORS)}")
    options = _make(COMPRESSORS[kind].options, rest, where)
    return Compression(type=kind, options=options)


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
    for name in ("gradient_predivide_factor", "prescale_gradients"):
        is_off = config.get(name) in (None, False, 1)
        require(is_off, f"{where}: {name} does not go with our own sections: leave it out")
    for name, off in AROUND_THE_SEAM.items():
        value = zero.get(name, off)
        require(
            value in (None, off),
            f"{where}: zero_optimization.{name} {value!r} does not go with our own sections: leave it out",
        )
    accumulated = config.get("data_types", {}).get("grad_accum_dtype", "fp32")
    require(
        stage == SHARDED_WEIGHTS or accumulated == "fp32",
        f"{where}: data_types.grad_accum_dtype {accumulated!r}: at stage {stage} our own sections add gradients up in "
        "fp32: leave it out",
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
    require(
        scaling is None or stage == SHARDED_WEIGHTS or not scaling.divisor,
        f"{where}: resblock_gradient_scaling.divisor is for stage 3, below which gradients are summed in float32",
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
            optimizer == CompactAdamW.__name__ or dtype == torch.float32,
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
        try:
            compression.options.for_shard(sections.machine_size or 1, 0, "full")
        except ValueError as error:
            raise InputError(f"{where}: gradient_compression, in shards of {sections.machine_size}: {error}") from None
        require(
            stage == SHARDED_WEIGHTS or dtype == torch.float32 or sections.is_mixed,
            f"{where}: gradient_compression at stage {stage} in 16 bits needs the section mixed_precision",
        )
        require(
            "grad_accum_dtype" not in config.get("data_types", {})
            or not isinstance(compression.options, PowerSGDOptions),
            f"{where}: data_types.grad_accum_dtype: {compression.type} adds gradients up in its errors: leave it out, "
            "and choose gradient_compression.errors, 1-6-9 or full",
        )
        require(
            stage == SHARDED_WEIGHTS or not zero.get("overlap_comm"),
            f"{where}: zero_optimization.overlap_comm copies gradients before they are compressed: set it to false",
        )


SHARDED_WEIGHTS = 3  # ZeRO stage
# Keys of zero_optimization with which DeepSpeed keeps or averages gradients and weights in ways of its own, past what
# our sections do, and the values that leave them off.
AROUND_THE_SEAM: dict[str, Any] = {
    "reduce_scatter": True,
    "compute_grad_norm": True,
    "zero_quantized_gradients": False,
    "zero_quantized_weights": False,
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "zenflow": None,
    "cpu_offload": False,
    "cpu_offload_param": False,
}
KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_SECTIONS = {
    "mixed_precision": MixedPrecision,
    "resblock_gradient_scaling": ScalingOptions,
    "hierarchical_sharding": HierarchicalSharding,
}
OWN_SECTIONS = {*_SECTIONS, "gradient_compression"}
