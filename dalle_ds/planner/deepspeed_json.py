"""What a DeepSpeed JSON says of memory, traffic and time: from a checked one to a way to lay out a run.

Reading and refusing is `training.deepspeed_config`'s alone; here everything is taken to be right. Bytes a parameter are
explained in ds_configs/README.md.
"""

from dataclasses import replace
from typing import Any

from dalle_ds.planner.ways import ALL, MACHINE, WHOLE, Buckets, State, StateFormat, Way

Config = dict[str, Any]
SHARDED_WEIGHTS = 3  # ZeRO stage
OWN_SECTIONS = ("mixed_precision", "resblock_gradient_scaling", "hierarchical_sharding", "gradient_compression")
ADAM, COMPACT = ("adam", "adamw"), "compactadamw"
FULL, WIDTHS = 4, {"fp32": 4, "fp16": 2, "bf16": 2}
# Formats of errors, and that in which PowerSGD keeps them and sends factors unless told; all else travels in full.
ERROR_BYTES, CODED = {"full": 4, "1-6-9": 2}, "1-6-9"
# Field of Buckets -> its names in zero_optimization.
SIZES = {
    "reduce": ("reduce_bucket_size",),
    "prefetch": ("stage3_prefetch_bucket_size", "prefetch_bucket_size"),
    "live": ("stage3_max_live_parameters", "max_live_parameters"),
    "reuse": ("stage3_max_reuse_distance", "max_reuse_distance"),
    "contiguous": ("contiguous_gradients",),
}
# Keys of zero_optimization that are read here, or change nothing of what is planned but for details.
KNOWN = {name for names in SIZES.values() for name in names} | {
    "stage", "overlap_comm", "offload_optimizer", "memory_efficient_linear", "allgather_bucket_size",
    "stage3_param_persistence_threshold", "param_persistence_threshold", "round_robin_gradients",
    "stage3_gather_16bit_weights_on_model_save",
}  # fmt: skip


def way_of(config: Config) -> Way:
    """The way of a config that `load_deepspeed_config` has accepted, our own sections with it."""
    zero, stage = config.get("zero_optimization", {}), _stage(config)
    sharding, compression = _section(config, "hierarchical_sharding"), _section(config, "gradient_compression")
    scope = ALL if sharding is None else MACHINE
    compressor = ("none" if sharding is not None else "") if compression is None else compression["type"]
    buckets, overlaps = _buckets(zero), zero.get("overlap_comm")
    if stage == 0 or _has_bf16_optimizer(config):
        # Averaged by the engine, in pieces of DeepSpeed's own size.
        buckets, overlaps = Buckets(contiguous=stage == 0), False
    return Way(
        state=_state(config),
        dtype=_dtype(config),
        is_scaled=_section(config, "resblock_gradient_scaling") is not None,
        weights=scope if stage == SHARDED_WEIGHTS else WHOLE,
        gradients=scope if stage > 1 else WHOLE,
        optimizer=scope if stage > 0 else WHOLE,
        compressor=compressor,
        wire=(compression or {}).get("wire", CODED if compressor == "powersgd" else "full"),
        matrix_rank=(compression or {}).get("matrix_rank", 0),
        buckets=buckets,
        overlaps=stage == SHARDED_WEIGHTS if overlaps is None else bool(overlaps),
        by_resblock=_is_ours(config) or _optimizer(config) == COMPACT,
        offloads=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
    )


def remarks_on(config: Config) -> list[str]:
    """What the plan of a config does not count."""
    others = sorted(set(config.get("zero_optimization", {})) - KNOWN)
    found = [f"zero_optimization.{key} is not counted" for key in others]
    if _optimizer(config) not in (*ADAM, COMPACT):
        found.append(f"optimizer {config['optimizer']['type']} is counted as Adam")
    if config["optimizer"].get("params", {}).get("amsgrad"):
        found.append("the third moment of amsgrad is not counted")
    if _stage(config) == 2 and _is_ours(config):
        # Its groups of parameters are then resblocks (stage_1_and_2.py, copy_grads_in_partition).
        found.append("a process keeps whole gradients of matrices that it updates a part of: more than is counted")
    if way_of(config).offloads:
        found.append("the time that an offloaded optimizer takes on the host is not counted")
    return found


def machine_size_of(config: Config) -> int:
    """GPUs of a machine under hierarchical sharding; 0 without."""
    return int((_section(config, "hierarchical_sharding") or {}).get("machine_size", 0))


def _state(config: Config) -> State:
    """Bytes a parameter: with any section of ours everything but matrices stays in 32 bits, and matrices do so below
    ZeRO 3."""
    stage, in_16_bit = _stage(config), any(_is_on(config, name) for name in ("fp16", "bf16"))
    if not _is_ours(config):
        matrices = _stock(config, stage, in_16_bit)
        return State(matrices=matrices, rest=replace(matrices, moments=8))
    if stage == SHARDED_WEIGHTS:
        has_master = in_16_bit and (_section(config, "mixed_precision") or {}).get("master_weights", True)
        in_full = not in_16_bit or _accumulates_in(config) == FULL
        matrices = StateFormat(
            weight=2 if in_16_bit else FULL,
            master=FULL * has_master,
            # PowerSGD's errors are in the same buffer, and need no other.
            gradient=_error_bytes(config) or (FULL if in_full else 2),
            moments=_moment_bytes(config, in_16_bit and not has_master),
        )
        return State(matrices=matrices, rest=StateFormat(weight=FULL, master=0, gradient=FULL, moments=8))
    # DeepSpeed's engine is one of float32, and the buffers of a compressor come on top.
    whole = StateFormat(weight=FULL, master=FULL * (stage > 0), gradient=FULL, moments=8)
    if _section(config, "gradient_compression") is None:
        return State(matrices=replace(whole, moments=_moment_bytes(config)), rest=whole)
    errors = _error_bytes(config) or FULL
    matrices = replace(whole, gradient=FULL + errors, moments=_moment_bytes(config))
    return State(matrices=matrices, rest=replace(whole, gradient=2 * FULL))


def _stock(config: Config, stage: int, in_16_bit: bool) -> StateFormat:
    """DeepSpeed's own. Of float32 weights it makes copies too, but for ZeRO 0."""
    accumulated = _accumulates_in(config)
    gradient = (accumulated or 2) if in_16_bit and stage > 0 else 2 if in_16_bit else FULL
    if _has_bf16_optimizer(config):
        gradient += 2  # which leaves those of the backward pass in place
    return StateFormat(
        weight=2 if in_16_bit else FULL,
        master=FULL * (in_16_bit or stage > 0),
        gradient=gradient,
        moments=_moment_bytes(config),
    )


def _has_bf16_optimizer(config: Config) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer for ZeRO 1, which has no buckets and does not overlap."""
    is_it = _stage(config) == 1 and _is_on(config, "bf16") and _accumulates_in(config) == FULL
    return is_it and not _is_ours(config)


def _moment_bytes(config: Config, rounds: bool = False) -> int:
    """Of a matrix's moments, and what rounding "kahan" keeps beside a weight that the optimizer `rounds`."""
    params = config["optimizer"].get("params", {})
    if _optimizer(config) != COMPACT:
        return 8
    return (4 if params.get("moment_bits", 16) == 16 else 8) + (
        2 if rounds and params.get("rounding") == "kahan" else 0
    )


def _error_bytes(config: Config) -> int:
    """Of an entry of PowerSGD's error buffers; 0 without PowerSGD."""
    compression = _section(config, "gradient_compression") or {}
    return ERROR_BYTES[compression.get("errors", CODED)] if compression.get("type") == "powersgd" else 0


def _accumulates_in(config: Config) -> int:
    return WIDTHS.get(config.get("data_types", {}).get("grad_accum_dtype"), 0)


def _dtype(config: Config) -> str:
    """What branches compute in."""
    if _is_on(config, "torch_autocast"):
        return "bf16"
    return next((name for name in ("fp16", "bf16") if _is_on(config, name)), "fp32")


def _buckets(zero: Config) -> Buckets:
    found = {field: zero[name] for field, names in SIZES.items() for name in names if name in zero}
    contiguous = bool(found.pop("contiguous", True))
    return Buckets(contiguous=contiguous, **{field: int(value) for field, value in found.items()})


def _stage(config: Config) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _optimizer(config: Config) -> str:
    return str(config["optimizer"]["type"]).lower()


def _is_ours(config: Config) -> bool:
    return any(_section(config, name) is not None for name in OWN_SECTIONS)


def _section(config: Config, name: str) -> Config | None:
    """A section of ours, if it is there and on."""
    section: Config | None = config.get(name)
    return None if section is None or not section.get("enabled", True) else section


def _is_on(config: Config, name: str) -> bool:
    """Whether one of DeepSpeed's sections is there and on."""
    return bool(config.get(name, {}).get("enabled"))
