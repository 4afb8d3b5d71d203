"""Reads a DeepSpeed JSON and refuses what DeepSpeed would accept in silence: a key that means nothing to it."""

import inspect
import json
from pathlib import Path
from typing import Any

from dalle_ds.config import InputError, require
from dalle_ds.training.optimizer import CompactAdamW
from dalle_ds.training.sections import OWN_SECTIONS, take_sections

# What DeepSpeed 0.19 reads at the top level (runtime/config.py and runtime/constants.py).
TOP_LEVEL = {
    "activation_checkpointing", "aio", "bf16", "comms_logger", "communication_data_type", "compile",
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
    "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
}
# Whole numbers of at least 1, which DeepSpeed would take as they come.
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# What DeepSpeed takes out of the params of Adam and AdamW before the optimizer sees them.
ADAM_ONLY = {"torch_adam", "adam_w_mode", "fp32_optimizer_states", "bias_correction"}
# The optimizer of training/optimizer.py.
COMPACT = "CompactAdamW"
# Sections with another home in this project, and the sentence that says where.
ELSEWHERE = {
    "scheduler": "the shape of the learning rate is a flag (--schedule.*); the JSON holds its peak",
    "checkpoint": "checkpoints have a format of their own, that resumes on any number of processes: leave it out",
}


def load_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """The checked content of the DeepSpeed JSON at `path`.

    Raises InputError, naming file, key and remedy, for a missing or malformed file, an unknown key, or a value of the
    wrong kind.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such DeepSpeed config; ds_configs/ holds ready ones") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text, as JSON is") from None
    try:
        config: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    require(isinstance(config, dict), f"{path}: the top level must be an object")
    config = _without_comments(config)
    for key, reason in ELSEWHERE.items():
        require(key not in config, f"{path}: section {key!r} does not belong here: {reason}")
    _refuse_unknown(config, TOP_LEVEL | OWN_SECTIONS, str(path))
    for section, known in SECTIONS.items():
        _refuse_unknown(config.get(section, {}), known, f"{path}: section {section!r}")
    for section, model in _pydantic_sections().items():
        aliases = {field.alias for field in model.model_fields.values() if field.alias}
        _refuse_unknown(config.get(section, {}), set(model.model_fields) | aliases, f"{path}: section {section!r}")
        _refuse_wrong_kinds(config.get(section, {}), model, f"{path}: {section}")
    for name in ("offload_optimizer", "offload_param"):
        device = (config.get("zero_optimization", {}).get(name) or {}).get("device")
        require(device != "nvme", f"{path}: zero_optimization.{name} on NVMe cannot be saved: use cpu, or leave it out")
    autocast = config.get("torch_autocast", {})
    require(
        not autocast.get("enabled") or autocast.get("dtype") == "bfloat16",
        f"{path}: torch_autocast in float16 never lowers its loss scale under ZeRO 1 and 2 in DeepSpeed 0.19: "
        "use the fp16 section, or dtype bfloat16",
    )
    require("optimizer" in config, f"{path}: section 'optimizer' is missing; it holds type and peak learning rate")
    _check_optimizer(config["optimizer"], f"{path}: optimizer")
    for key in BATCH_KEYS:
        value = config.get(key, 1)
        require(type(value) is int and value > 0, f"{path}: {key} {value!r} must be a whole number of at least 1")
    clipping = config.get("gradient_clipping", 0)
    require(
        _is_number(clipping) and clipping >= 0, f"{path}: gradient_clipping {clipping!r} must be a number, 0 for none"
    )
    sections, _ = take_sections(config, str(path))
    if not sections.is_any:
        _check_accumulation_dtype(config, str(path))
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


def _without_comments(value: Any) -> Any:
    """The value without the keys that start with `//`, at any depth: DeepSpeed would refuse them, or pass them on."""
    if not isinstance(value, dict):
        return value
    return {key: _without_comments(inner) for key, inner in value.items() if not key.startswith("//")}


def _refuse_unknown(section: dict[str, Any], known: set[str], where: str) -> None:
    require(isinstance(section, dict), f"{where} must be an object")
    unknown = sorted(set(section) - known)
    require(not unknown, f"{where}: unknown key {unknown[0] if unknown else ''!r}; known keys are {sorted(known)}")


def _refuse_wrong_kinds(section: dict[str, Any], model: Any, where: str) -> None:
    from pydantic import ValidationError

    try:
        model(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}.{key} {first['input']!r} does not do: {first['msg']}") from None


def _check_optimizer(section: dict[str, Any], where: str) -> None:
    """Raises InputError for an optimizer that neither DeepSpeed nor torch has, and for params it does not take."""
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    name, params = section.get("type"), section.get("params", {})
    known = isinstance(name, str) and (
        name == COMPACT or name.lower() in DEEPSPEED_OPTIMIZERS or hasattr(torch.optim, name)
    )
    require(known, f"{where}.type {name!r} is no optimizer of DeepSpeed or torch; use AdamW or {COMPACT}")
    require(isinstance(params, dict) and "lr" in params, f"{where}.params.lr, the peak, is missing")
    require(
        _is_number(params["lr"]) and params["lr"] > 0, f"{where}.params.lr {params['lr']!r} must be a number above 0"
    )
    if name == COMPACT:
        taken = set(inspect.signature(CompactAdamW).parameters) - {"params", "seed"}
        _refuse_unknown(params, taken, f"{where}.params")
        try:
            CompactAdamW([torch.zeros(1)], **params)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}.params: {error}") from None
    if str(name).lower() in ("adam", "adamw"):
        taken = set(inspect.signature(torch.optim.AdamW).parameters) - {"params"}
        _refuse_unknown(params, taken | ADAM_ONLY, f"{where}.params")


def _check_accumulation_dtype(config: dict[str, Any], where: str) -> None:
    """Raises InputError for what DeepSpeed cannot do without ZeRO: 16-bit training with another dtype for gradients."""
    in_16_bit = any(config.get(name, {}).get("enabled") for name in ("fp16", "bf16"))
    require(
        not in_16_bit or zero_stage(config) > 0 or "grad_accum_dtype" not in config.get("data_types", {}),
        f"{where}: data_types.grad_accum_dtype needs ZeRO in 16-bit training: set zero_optimization.stage to 1, "
        "2 or 3, or leave it out",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _pydantic_sections() -> dict[str, Any]:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
