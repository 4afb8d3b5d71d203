"""From a model and a DeepSpeed JSON to a running engine: the only caller of `deepspeed.initialize`."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_ds.config import InputError, require
from dalle_ds.training.deepspeed_config import COMPACT, zero_stage
from dalle_ds.training.engine import Engine, Extras
from dalle_ds.training.engine_state import place_in_whole
from dalle_ds.training.gradient_path import GradientPath, Share, Unscaling
from dalle_ds.training.gradient_scales import GradientScales, NoScaling
from dalle_ds.training.optimizer import CompactAdamW
from dalle_ds.training.sections import SHARDED_WEIGHTS, Sections, sixteen_bit_dtype, take_sections
from dalle_kernels.compression.zero_hook import Machines, equalize_replicas, find_machines, shard_shape

DEFAULT_SUB_GROUP = 10**9  # DeepSpeed's


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What a model is to be built in: the dtype in which matrices of resblocks are stored, and computed with."""

    matrix_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype | None = None
    """None for that of the matrices"""


def build_engine(
    build_model: Callable[[Precision], nn.Module],
    config: dict[str, Any],
    seed: int,
    lr_multiplier: Callable[[str], float] = lambda name: 1.0,
    resblock_of: Callable[[str], int | None] = lambda name: None,
) -> Engine:
    """Builds the model, sharded from the start under ZeRO-3, and hands it to DeepSpeed as `config` says.

    `lr_multiplier` maps a parameter's name to a multiple of the peak learning rate, `resblock_of` to the number of its
    resblock, if it has one. Matrices are decayed; gains, biases and single vectors are not. The same seed gives the
    same weights on any number of ranks. The engine has `extras`. A model whose gradients are scaled needs a method
    `set_gradient_scales`. Raises InputError for sections that the model or the number of ranks cannot have.
    """
    sections, ds_config = take_sections(config, "the DeepSpeed config")
    stage, dtype = zero_stage(config), sixteen_bit_dtype(config)
    machines = None if sections.machine_size is None else _find_machines(sections.machine_size)
    precision = Precision()
    if sections.is_any and stage == SHARDED_WEIGHTS:
        precision = Precision(matrix_dtype=dtype)
    elif sections.is_any:
        # DeepSpeed's engine is one of float32, to which the model casts gradients back.
        ds_config = {name: value for name, value in ds_config.items() if name not in ("fp16", "bf16", "data_types")}
        precision = Precision(compute_dtype=None if dtype == torch.float32 else dtype)
    torch.manual_seed(seed)
    with _sharding(ds_config, machines, in_own_dtypes=sections.is_any):
        model = build_model(precision)
    if machines is not None:
        equalize_replicas(model.parameters(), machines)
    resblocks = {name: resblock_of(name) for name, _ in model.named_parameters()}
    is_apart = sections.is_any or config["optimizer"]["type"] == COMPACT
    groups = _groups(model, lr_multiplier, resblocks, apart=is_apart)
    multipliers = [group.pop("multiplier") for group in groups]
    extras, plan = _make_extras(sections, config, model, resblocks, machines)
    engine = _initialize(model, groups, ds_config, seed, plan)
    engine.extras = extras
    if extras.scaling.values is not None:
        engine.module.set_gradient_scales(extras.scaling.values)
    engine.peak_learning_rates = [
        group["lr"] * multiplier for group, multiplier in zip(engine.optimizer.param_groups, multipliers, strict=True)
    ]
    place_in_whole(engine)
    return engine


def _find_machines(size: int) -> Machines:
    try:
        return find_machines(size)
    except ValueError as error:
        raise InputError(f"hierarchical_sharding: {error}") from None


def _sharding(
    ds_config: dict[str, Any], machines: Machines | None, *, in_own_dtypes: bool
) -> contextlib.AbstractContextManager[Any]:
    """Inside, parameters are sharded as they are made, where ZeRO's stage is 3."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride

    if zero_stage(ds_config) != SHARDED_WEIGHTS:
        return contextlib.nullcontext()
    settings: dict[str, Any] = {}
    if in_own_dtypes:
        # Else DeepSpeed makes every tensor of the one dtype that its config enables.
        settings = {"dtype": torch.float32, "tensor_overrides": [DeepSpeedTensorOverride.device]}
    if machines is not None:
        settings["data_parallel_group"] = machines.shard_group
    return deepspeed.zero.Init(config_dict_or_path=ds_config, **settings)  # type: ignore[no-any-return]


def _groups(
    model: nn.Module, lr_multiplier: Callable[[str], float], resblocks: dict[str, int | None], *, apart: bool
) -> list[dict[str, Any]]:
    """Parameter groups of one decay and one multiple of the learning rate each.

    Set `apart`, a group also belongs to one resblock, and holds either its matrices, whose moments may have 16 bits, or
    what stays in 32.
    """
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        resblock, multiplier = resblocks[name], lr_multiplier(name)
        is_matrix = _n_rows(parameter) > 1
        place = (resblock, is_matrix and resblock is not None) if apart else None
        group = groups.setdefault((place, is_matrix, multiplier), {"params": [], "multiplier": multiplier})
        group["params"].append(parameter)
        if not is_matrix:
            group["weight_decay"] = 0.0
        if apart and not (is_matrix and resblock is not None):
            group["moment_bits"] = 32
    return list(groups.values())


def _make_extras(
    sections: Sections,
    config: dict[str, Any],
    model: nn.Module,
    resblocks: dict[str, int | None],
    machines: Machines | None,
) -> tuple[Extras, Any]:
    """What the engine carries, and the plan by which its update differs from DeepSpeed's: None for not at all."""
    from deepspeed.accelerator import get_accelerator

    if not sections.is_any:
        return Extras(NoScaling()), None
    stage, world_size = zero_stage(config), dist.get_world_size()
    device = torch.device(get_accelerator().current_device_name())
    names = {parameter: name for name, parameter in model.named_parameters()}
    n_resblocks = 1 + max((index for index in resblocks.values() if index is not None), default=-1)
    require(n_resblocks > 0, "the DeepSpeed config: our own sections are for the prior: this model has no resblocks")
    options = sections.resblock_gradient_scaling
    scaling = NoScaling() if options is None else GradientScales(options, n_resblocks, world_size, device)
    # With scales, the loss is divided by the number of ranks, and they are as many times larger (Appendix D).
    factor = 1.0 if options is None else float(world_size)
    unscaling = Unscaling(scaling, device)
    if stage == SHARDED_WEIGHTS:
        from dalle_ds.training.stage3 import Stage3Plan

        n_shards = world_size if machines is None else machines.size
        ordinal = dist.get_rank() if machines is None else machines.ordinal
        in_full = config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        in_full = in_full or sixteen_bit_dtype(config) == torch.float32
        compressor = sections.make_compressor(n_shards, ordinal, buffers="full" if in_full else "1-6-9")
        shares = {
            name: Share(resblocks[name], _shard_shape(name, parameter, resblocks[name], n_shards, sections))
            for parameter, name in names.items()
        }
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True) if machines is None else None
        path = GradientPath(
            shares,
            unscaling,
            compressor,
            device,
            between=alone if machines is None else machines.replica_group,
            inside=dist.group.WORLD if machines is None else machines.shard_group,
        )
        divisor = n_shards if options is None else options.divisor_of(n_shards)
        plan: Any = Stage3Plan(
            path=path,
            names=names,
            master_weights=sections.master_weights,
            divisor=divisor,
            factor=factor * divisor / n_shards,
        )
        return Extras(scaling, n_resblocks, unscaling, path, machines), plan
    from dalle_ds.training.lower_stages import WholePlan

    averaging = None
    if sections.gradient_compression is not None:
        shares = {name: Share(resblocks[name], tuple(parameter.shape)) for parameter, name in names.items()}
        compressor = sections.make_compressor(1, 0, buffers="full")
        averaging = GradientPath(shares, unscaling, compressor, device, between=dist.group.WORLD, inside=None)
    of_parameters = {parameter: resblocks[name] for parameter, name in names.items()}
    plan = WholePlan(unscaling=unscaling, path=averaging, names=names, resblocks=of_parameters, factor=factor)
    return Extras(scaling, n_resblocks, unscaling, averaging), plan


def _shard_shape(name: str, parameter: Any, resblock: int | None, n_shards: int, sections: Sections) -> tuple[int, ...]:
    """Matrices of resblocks keep their rows, as far as shards divide them; anything else is flat."""
    if resblock is not None:
        try:
            return shard_shape(name, parameter.ds_shape, n_shards)
        except ValueError as error:
            if sections.gradient_compression is not None:
                raise InputError(f"gradient_compression: {error}") from None
    return (math.ceil(parameter.ds_numel / n_shards),)


def _initialize(
    model: nn.Module, groups: list[dict[str, Any]], ds_config: dict[str, Any], seed: int, plan: Any
) -> Engine:
    import deepspeed

    optimizer, stage = None, zero_stage(ds_config)
    settings = ds_config["optimizer"]
    if settings["type"] == COMPACT:
        optimizer = CompactAdamW(groups, **settings["params"], seed=seed)
        ds_config = {name: value for name, value in ds_config.items() if name != "optimizer"}
        ds_config["zero_allow_untested_optimizer"] = True
    clipping = ds_config.get("gradient_clipping", 0.0)
    installation: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if plan is not None and stage == SHARDED_WEIGHTS:
        from dalle_ds.training import stage3

        ds_config = _with_whole_groups(ds_config, groups)
        installation = stage3.installed(plan)
    elif plan is not None and stage > 0:
        from dalle_ds.training import lower_stages

        installation = lower_stages.installed(plan)
    elif plan is not None:
        ds_config = {**ds_config, "gradient_clipping": 0.0}
    with installation:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=groups, config=ds_config)
    if plan is not None and stage == 0:
        from dalle_ds.training.lower_stages import UpdateHook

        UpdateHook(plan, clipping).attach(engine)
    if hasattr(engine.optimizer, "fp16_groups") and stage == 0:
        # In 16-bit training without ZeRO, DeepSpeed 0.19.8 begins with a step of no gradients, which Adam would count.
        # It has decayed the float32 weights too, and not the model's copy of them.
        engine.optimizer.optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
    return engine


def _with_whole_groups(ds_config: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The config with sub-groups that take any parameter group whole: matrices of a resblock are taken together."""
    largest = max(sum(parameter.partition_numel() for parameter in group["params"]) for group in groups)
    zero = ds_config["zero_optimization"]
    size = zero.get("sub_group_size", max(largest, DEFAULT_SUB_GROUP))
    require(
        size >= largest,
        f"zero_optimization.sub_group_size {size} would split a resblock, of which a rank holds {largest} elements: "
        "leave it out",
    )
    return {**ds_config, "zero_optimization": {**zero, "sub_group_size": size}}


def _n_rows(parameter: Tensor) -> int:
    """Rows of a matrix; 1 for a vector. ZeRO-3 keeps a sharded parameter's shape aside."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return int(shape[0]) if len(shape) > 1 else 1
