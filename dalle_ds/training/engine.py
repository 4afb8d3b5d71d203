"""The DeepSpeed engine around a model: what is asked of it step by step, and of its weights."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.training.gradient_path import GradientPath, Unscaling
from dalle_ds.training.gradient_scales import GradientScales, NoScaling
from dalle_kernels.compression.zero_hook import Machines

Engine = Any


@dataclass(frozen=True)
class Extras:
    """What our engines have beyond DeepSpeed's."""

    scaling: GradientScales | NoScaling
    n_resblocks: int = 0
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
