"""Reads a DeepSpeed JSON and refuses what DeepSpeed would accept in silence: a key that means nothing to it."""

import json
from pathlib import Path
from typing import Any

from dalle_ds.config import InputError, require

# What DeepSpeed 0.19 reads at the top level (runtime/config.py and runtime/constants.py).
TOP_LEVEL = {
    "activation_checkpointing", "aio", "bf16", "checkpoint", "comms_logger", "communication_data_type", "compile",
    "data_types", "dump_state", "elasticity", "flops_profiler", "fp16", "gradient_accumulation_steps",
    "gradient_clipping", "gradient_predivide_factor", "log_level", "memory_breakdown", "optimizer",
    "prescale_gradients", "steps_per_print", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
# Sections that DeepSpeed reads as plain dictionaries, so that a misspelt key would be lost.
SECTIONS = {
    "optimizer": {"type", "params", "legacy_fusion"},
    "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
    "checkpoint": {"tag_validation", "load_universal", "use_node_local_storage", "parallel_write"},
    "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
}
# Sections with another home in this project, and the sentence that says where.
ELSEWHERE = {"scheduler": "the shape of the learning rate is a flag (--schedule.*); the JSON holds its peak"}


def load_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """The checked content of the DeepSpeed JSON at `path`.

    Raises InputError, naming file, key and remedy, for a missing or malformed file and for an unknown key.
    """
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        raise InputError(f"{path}: no such DeepSpeed config; ds_configs/ holds ready ones") from None
    try:
        config: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    require(isinstance(config, dict), f"{path}: the top level must be an object")
    for key, reason in ELSEWHERE.items():
        require(key not in config, f"{path}: section {key!r} does not belong here: {reason}")
    _refuse_unknown(config, TOP_LEVEL, str(path))
    for section, known in SECTIONS.items():
        _refuse_unknown(config.get(section, {}), known, f"{path}: section {section!r}")
    for section, model in _pydantic_sections().items():
        aliases = {field.alias for field in model.model_fields.values() if field.alias}
        _refuse_unknown(config.get(section, {}), set(model.model_fields) | aliases, f"{path}: section {section!r}")
    require("optimizer" in config, f"{path}: section 'optimizer' is missing; it holds type and peak learning rate")
    params = config["optimizer"].get("params", {})
    require(isinstance(params, dict) and "lr" in params, f"{path}: optimizer.params.lr, the peak, is missing")
    require(
        "train_micro_batch_size_per_gpu" in config or "train_batch_size" in config,
        f"{path}: set train_micro_batch_size_per_gpu or train_batch_size",
    )
    return config


def batch_sizes(config: dict[str, Any], world_size: int, where: str) -> tuple[int, int]:
    """(micro-batch size a rank, accumulation steps) for `world_size` ranks, as DeepSpeed works them out."""
    micro = config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps")
    total = config.get("train_batch_size")
    if micro is None:
        assert total is not None
        accumulation = accumulation or 1
        micro = total // (world_size * accumulation)
    elif accumulation is None:
        accumulation = 1 if total is None else total // (world_size * micro)
    require(
        micro > 0 and accumulation > 0 and total in (None, micro * accumulation * world_size),
        f"{where}: train_batch_size {total} is not micro-batch x accumulation x {world_size} processes; "
        f"set train_micro_batch_size_per_gpu and gradient_accumulation_steps alone",
    )
    return micro, accumulation


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _refuse_unknown(section: dict[str, Any], known: set[str], where: str) -> None:
    require(isinstance(section, dict), f"{where} must be an object")
    # Keys that start with "//" are comments.
    unknown = sorted(key for key in section if key not in known and not key.startswith("//"))
    require(not unknown, f"{where}: unknown key {unknown[0] if unknown else ''!r}; known keys are {sorted(known)}")


def _pydantic_sections() -> dict[str, Any]:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
