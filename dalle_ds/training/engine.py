"""The DeepSpeed engine around a model: the only caller of `deepspeed.initialize`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from dalle_ds.training.deepspeed_config import zero_stage

Engine = Any

SHARDED_WEIGHTS = 3  # ZeRO stage


def build_engine(
    build_model: Callable[[], nn.Module],
    config: dict[str, Any],
    seed: int,
    lr_multiplier: Callable[[str], float] = lambda name: 1.0,
) -> Engine:
    """Builds the model, sharded from the start under ZeRO-3, and hands it to DeepSpeed.

    Matrices are decayed; gains, biases and single vectors are not. `lr_multiplier` maps a parameter's name to a
    multiple of the peak learning rate. The same seed gives the same weights on any number of ranks.
    """
    import deepspeed

    torch.manual_seed(seed)
    if zero_stage(config) == SHARDED_WEIGHTS:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = build_model()
    else:
        model = build_model()
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        decayed, multiplier = _n_rows(parameter) > 1, lr_multiplier(name)
        group = groups.setdefault((decayed, multiplier), {"params": [], **({} if decayed else {"weight_decay": 0.0})})
        group["params"].append(parameter)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(groups.values()), config=config)
    if hasattr(engine.optimizer, "fp16_groups") and zero_stage(config) == 0:
        # In 16-bit training without ZeRO, DeepSpeed 0.19.8 begins with a step of no gradients, which Adam would count.
        engine.optimizer.optimizer.state.clear()
    multipliers = [multiplier for _, multiplier in groups]
    engine.peak_learning_rates = [
        group["lr"] * multiplier for group, multiplier in zip(engine.optimizer.param_groups, multipliers, strict=True)
    ]
    return engine


def _n_rows(parameter: Tensor) -> int:
    """Rows of a matrix; 1 for a vector. ZeRO-3 keeps a sharded parameter's shape aside."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return int(shape[0]) if len(shape) > 1 else 1


def set_learning_rate(engine: Engine, multiplier: float) -> float:
    """Sets every group to `multiplier` of its peak; returns the largest."""
    for group, peak in zip(engine.optimizer.param_groups, engine.peak_learning_rates, strict=True):
        group["lr"] = peak * multiplier
    return float(max(group["lr"] for group in engine.optimizer.param_groups))


def backward(engine: Engine, loss: Tensor) -> None:
    """Adds the gradients of a micro-batch's loss.

    DeepSpeed up to 0.19.8 does not scale the loss in fp16 without ZeRO, though it unscales the gradients: updates then
    vanish. So it is scaled here.
    """
    engine.unscaled_norm_factor = 1.0
    if engine.fp16_enabled() and engine.zero_optimization_stage() == 0:
        scale = float(engine.optimizer.loss_scale)
        loss = loss.float() * scale
        # Of DeepSpeed's two optimizers of that kind, the unfused one also reports the norm of the scaled gradients.
        engine.unscaled_norm_factor = 1 / scale if hasattr(engine.optimizer, "fp32_groups") else 1.0
    engine.backward(loss)


def gradient_norm(engine: Engine) -> float | None:
    """Global norm of the last step's gradients before clipping; None where DeepSpeed has not computed it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm) * engine.unscaled_norm_factor


def n_parameters(engine: Engine) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())


@contextlib.contextmanager
def whole_model(engine: Engine) -> Iterator[nn.Module]:
    """The module with all parameters at hand on every rank, in evaluation mode; every rank must enter."""
    import deepspeed

    sharded = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
    engine.eval()
    with torch.no_grad(), deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield engine.module
    engine.train()


def gather_weights(engine: Engine) -> dict[str, Tensor]:
    """The whole weights in float32 on the CPU of rank 0, one parameter at a time; empty on other ranks.

    Every rank must call. In 16-bit training these are the optimizer's float32 weights, not the model's copy of them.
    """
    weights = {}
    for name, _, master in _whole_masters(engine):
        if torch.distributed.get_rank() == 0:
            weights[name] = master.detach().to("cpu", torch.float32, copy=True)
    return weights


def master_tensors(engine: Engine) -> list[Tensor]:
    """What the optimizer updates on this rank: whole parameters, float32 copies of them, or under ZeRO flat shards."""
    if engine.zero_optimization_stage() == SHARDED_WEIGHTS:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


@torch.no_grad()
def set_masters(engine: Engine, weight: Callable[[str], Tensor]) -> None:
    """Fills the master tensors of this rank from whole weights by name; the model's copy stays as it is."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    whole = _unsharded_masters(engine)
    for name, parameter in engine.module.named_parameters():
        if whole:
            whole[parameter].copy_(weight(name))
        elif hasattr(parameter, "ds_id"):
            # DeepSpeed's own way with whole weights fails where the ranks do not divide them evenly.
            n, rank = parameter.ds_tensor.ds_numel, torch.distributed.get_rank(parameter.ds_process_group)
            flat = weight(name).flatten()
            shard = torch.zeros(n)
            shard[: max(0, len(flat) - n * rank)] = flat[n * rank : n * (rank + 1)]
            safe_set_local_fp32_param(parameter, shard)
        else:
            safe_set_full_fp32_param(parameter, weight(name))


@torch.no_grad()
def fill_model(engine: Engine) -> None:
    """Makes the weights that the model computes with those of the master tensors; every rank must call."""
    import deepspeed

    for _, parameter, master in _whole_masters(engine):
        if master is not parameter:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                parameter.data.copy_(master)


def _whole_masters(engine: Engine) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """(name, parameter, its whole master weight), one after the other; every rank must go through all of them."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = _unsharded_masters(engine)
    for name, parameter in engine.module.named_parameters():
        yield name, parameter, whole[parameter] if whole else safe_get_full_fp32_param(parameter)


def _unsharded_masters(engine: Engine) -> dict[nn.Parameter, Tensor]:
    """The master of each parameter where ZeRO is off; empty where it is on, for DeepSpeed then has a way of its own."""
    if engine.zero_optimization_stage() > 0:
        return {}
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp16_groups"):
        return {parameter: parameter for parameter in engine.module.parameters()}
    if hasattr(optimizer, "fp32_groups"):
        masters = optimizer.fp32_groups
    else:  # DeepSpeed's fused Adam keeps one flat tensor a group
        flat_groups = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        masters = [_unflatten_dense_tensors(flat.detach(), group) for flat, group in flat_groups]  # type: ignore[no-untyped-call]
    groups = zip(optimizer.fp16_groups, masters, strict=True)
    return {parameter: master for group in groups for parameter, master in zip(*group, strict=True)}
