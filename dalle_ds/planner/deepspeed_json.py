"""What a DeepSpeed JSON says of memory and traffic. Training checks such a file in full; here only what is read."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dalle_ds.config import InputError, require
from dalle_ds.planner.ways import ALL, MACHINE, WHOLE, State, StateFormat, Way

SHARDED_WEIGHTS = 3  # ZeRO stage
# Sections that are off unless they say that they are on; ours are on.
SWITCHED = ("fp16", "bf16", "torch_autocast")
OWN_SECTIONS = ("mixed_precision", "resblock_gradient_scaling", "hierarchical_sharding", "gradient_compression")
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# Sizes that DeepSpeed 0.19 takes where the JSON names none, in elements.
MAX_LIVE, BUCKET = 10**9, 5 * 10**8


@dataclass(frozen=True, kw_only=True)
class JsonSettings:
    """The run that a JSON describes; 0 where it leaves something open."""

    name: str
    way: Way
    micro_batch: int
    batch: int
    machine_size: int
    matrix_rank: int
    wire: str
    live_elements: int
    bucket_elements: int
    in_bfloat16: bool


def read_deepspeed_json(path: Path) -> JsonSettings:
    """Reads the settings. Raises InputError that names the file and what is wrong in it."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such DeepSpeed config; ds_configs/ holds ready ones") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    require(isinstance(config, dict), f"{path}: the top level must be an object")
    zero = _section(config, "zero_optimization", path)
    stage = zero.get("stage", 0)
    require(stage in (0, 1, 2, 3), f"{path}: zero_optimization.stage {stage!r} must be 0, 1, 2 or 3")
    compression = _section(config, "gradient_compression", path)
    machine_size = _count(_section(config, "hierarchical_sharding", path), "machine_size", path)
    require(
        not machine_size or stage == SHARDED_WEIGHTS,
        f"{path}: hierarchical_sharding shards parameters: set zero_optimization.stage to 3",
    )
    is_compressed = compression.get("type", "none") != "none"
    require(
        not is_compressed or machine_size > 0,
        f"{path}: the plan knows gradient_compression beside hierarchical_sharding alone: add that, or take it out",
    )
    scope = MACHINE if machine_size else ALL
    way = Way(
        state=_state(config, stage, path),
        compute_bytes=_compute_bytes(config, path),
        weights=scope if stage == SHARDED_WEIGHTS else WHOLE,
        gradients=scope if stage > 1 else WHOLE,
        optimizer=scope if stage > 0 else WHOLE,
        is_compressed=is_compressed,
        error_bytes=4 if compression.get("errors") == "full" else 2,
    )
    return JsonSettings(
        name=path.name,
        way=way,
        micro_batch=_count(config, "train_micro_batch_size_per_gpu", path),
        batch=_count(config, "train_batch_size", path),
        machine_size=machine_size,
        matrix_rank=_count(compression, "matrix_rank", path),
        # What is not compressed travels in full between machines, unless it says otherwise.
        wire=compression.get("wire", "full" if machine_size and not is_compressed else ""),
        live_elements=_count(zero, "stage3_max_live_parameters", path) or MAX_LIVE,
        bucket_elements=_count(zero, "reduce_bucket_size", path) or BUCKET,
        in_bfloat16=bool(_section(config, "bf16", path)),
    )


def _compute_bytes(config: dict[str, Any], path: Path) -> int:
    return 2 if any(_section(config, name, path) for name in ("fp16", "bf16", "torch_autocast")) else 4


def _state(config: dict[str, Any], stage: int, path: Path) -> State:
    """Bytes a parameter, as ds_configs/README.md explains them."""
    in_16_bit = any(_section(config, name, path) for name in ("fp16", "bf16"))
    # With any section of ours the rest stays in 32 bits, and the matrices leave them under stage 3 alone.
    is_ours = any(config.get(name, {}).get("enabled", True) for name in OWN_SECTIONS if name in config)
    weight = 2 if in_16_bit and (stage == SHARDED_WEIGHTS or not is_ours) else 4
    accumulated = _section(config, "data_types", path).get("grad_accum_dtype")
    require(accumulated in (None, *DTYPE_BYTES), f"{path}: data_types.grad_accum_dtype {accumulated!r} is unknown")
    gradient = weight if accumulated is None or stage == 0 else DTYPE_BYTES[accumulated]
    optimizer = _section(config, "optimizer", path)
    is_compact = optimizer.get("type") == "CompactAdamW" and optimizer.get("params", {}).get("moment_bits", 16) == 16
    master = _section(config, "mixed_precision", path).get("master_weights", True)
    # ZeRO 1 and 2 keep a copy of float32 weights too.
    has_master = (weight == 2 and master) or stage in (1, 2)
    large = StateFormat(weight=weight, master=4 * has_master, gradient=gradient, moments=4 if is_compact else 8)
    # CompactAdamW keeps 16-bit moments of matrices of resblocks alone.
    rest = StateFormat(weight=4, master=4 * (stage in (1, 2)), gradient=4, moments=8)
    return State(matrices=large, rest=rest if is_ours else replace(large, moments=8))


def _section(config: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = config.get(name, {})
    require(isinstance(section, dict), f"{path}: section {name!r} must be an object")
    return section if section.get("enabled", name not in SWITCHED) else {}


def _count(section: dict[str, Any], name: str, path: Path) -> int:
    value = section.get(name, 0)
    require(type(value) is int and value >= 0, f"{path}: {name} {value!r} must be a whole number of at least 1")
    return int(value)
