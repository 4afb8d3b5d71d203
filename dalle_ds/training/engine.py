"""The DeepSpeed engine around a model: what is asked of it step by step, and of its weights."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from dalle_ds.training.gradient_path import GradientPath, Unscaling
from dalle_ds.training.gradient_scales import GradientScales, NoScaling
from dalle_kernels.compression.zero_hook import Machines

Engine = Any

SHARDED_WEIGHTS = 3  # ZeRO stage


@dataclass(frozen=True)
class Extras:
    """What our engines have beyond DeepSpeed's."""

    scaling: GradientScales | NoScaling
    unscaling: Unscaling | None = None
    """None where DeepSpeed handles gradients alone"""
    path: GradientPath | None = None
    """None where DeepSpeed averages gradients"""
    machines: Machines | None = None
    """None where all ranks share one set of shards"""


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
    if engine.extras.scaling.values is not None:
        loss = loss / torch.distributed.get_world_size()  # for which the scales make up
    elif engine.fp16_enabled() and engine.zero_optimization_stage() == 0:
        scale = float(engine.optimizer.loss_scale)
        loss = loss.float() * scale
        # Of DeepSpeed's two optimizers of that kind, the unfused one also reports the norm of the scaled gradients.
        engine.unscaled_norm_factor = 1 / scale if hasattr(engine.optimizer, "fp32_groups") else 1.0
    engine.backward(loss)


def gradient_norm(engine: Engine) -> float | None:
    """Global norm of the last step's gradients before clipping; None where DeepSpeed has not computed it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm) * engine.unscaled_norm_factor


def instruments(engine: Engine) -> dict[str, Any]:
    """What is known of an engine's gradients so far: updates skipped, and by resblock scales and non-finite events."""
    values: dict[str, Any] = {"skipped_updates": engine.skipped_steps}
    scaling = engine.extras.scaling
    if scaling.values is not None and scaling.n_events is not None:
        values["gradient_scales"] = scaling.values.tolist()
        values["nonfinite_events"] = scaling.n_events.tolist()
    norm = gradient_norm(engine)
    if norm is not None and math.isfinite(norm):
        values["gradient_norm"] = norm
    return values


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
    if engine.zero_optimization_stage() == SHARDED_WEIGHTS:
        optimizer = engine.optimizer
        flats = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
        # What was gathered is of the old weights, and small parameters always are.
        engine.empty_partition_cache()
        for flat, master in flats:
            flat.data.copy_(master.data)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        return
    for _, parameter, master in _whole_masters(engine):
        if master is not parameter:
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
