"""The DeepSpeed engine around a model: the only caller of `deepspeed.initialize`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.training.deepspeed_config import zero_stage

Engine = Any


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
    if zero_stage(config) == 3:
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
    """The full state dict on the CPU of rank 0, one parameter at a time; empty on other ranks; every rank must call."""
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if torch.distributed.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights
