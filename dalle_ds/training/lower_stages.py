"""Gradient scales and compression where weights are whole on every rank: ZeRO 0, 1 and 2 in float32.

The model computes its resblocks in 16 bits and casts gradients back, so that DeepSpeed's engine is one of float32:
what is left to do is to unscale, once, before DeepSpeed's norm and clip. With compression ranks average through a
`GradientPath` instead of DeepSpeed's all-reduce, which then has nothing to send.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed.runtime.zero.stage_1_and_2 as zero12
import torch
from torch import Tensor, nn

from dalle_ds.training.gradient_path import GradientPath, Unscaling, clip_
from dalle_ds.training.seam import check, check_overrides


@dataclass(frozen=True, kw_only=True)
class WholePlan:
    """What is done to gradients; without a `path` DeepSpeed averages them."""

    unscaling: Unscaling
    path: GradientPath | None
    names: Mapping[nn.Parameter, str]
    resblocks: Mapping[nn.Parameter, int | None]
    factor: float
    """what DeepSpeed's average, or a rank's own gradient under compression, is multiplied by to be the mean"""

    @torch.no_grad()
    def exchange(self) -> Tensor:
        """Puts the averages through the path into all `grad`s; returns their norm, infinite if it must be skipped."""
        assert self.path is not None
        for parameter, name in self.names.items():
            self.path.receive(name, parameter.grad.view(-1), self.factor, last=False)  # type: ignore[union-attr]
        norm = self.path.finish()
        parameters = {name: parameter for parameter, name in self.names.items()}
        for names in self.path.taken_together():
            self.path.take(names, {name: parameters[name].grad for name in names})  # type: ignore[misc]
        return norm

    @torch.no_grad()
    def unscale_(self, gradient: Tensor, parameter: nn.Parameter) -> None:
        gradient.mul_(self.unscaling.look(self.names[parameter], self.resblocks[parameter], gradient, self.factor))


class UpdateHook:
    """Stage 0: what runs before each step of the optimizer, in the place of DeepSpeed's clipping."""

    def __init__(self, plan: WholePlan, clipping: float) -> None:
        self.plan, self.clipping = plan, clipping

    def attach(self, engine: Any) -> None:
        engine.optimizer.overflow = False  # where DeepSpeed looks for it
        engine.optimizer.register_step_pre_hook(self)
        if self.plan.path is not None:
            check(hasattr(engine, "buffered_allreduce_fallback"), "has no engine.buffered_allreduce_fallback")
            engine.buffered_allreduce_fallback = lambda grads=None, elements_per_buffer=0: None

    @torch.no_grad()
    def __call__(self, optimizer: Any, args: Any, settings: Any) -> None:
        parameters = list(self.plan.names)
        if self.plan.path is not None:
            norm = self.plan.exchange()
        else:
            gradients = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
            for parameter, gradient in gradients.items():
                self.plan.unscale_(gradient, parameter)
            norm = torch.nn.utils.get_total_norm(gradients.values())
            norm = torch.where(self.plan.unscaling.agree(), torch.inf, norm)
        optimizer._global_grad_norm = norm
        optimizer.overflow = not norm.isfinite()
        for parameter in parameters:
            if optimizer.overflow:
                parameter.grad = None  # torch's optimizers and ours leave a parameter without a gradient alone
            elif parameter.grad is not None:
                clip_(parameter.grad, norm, self.clipping)


class ScaledUpdate(zero12.DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """DeepSpeed's optimizer of stages 1 and 2; each parameter group must belong to one resblock, or to none."""

    def __init__(self, plan: WholePlan, *args: Any, **settings: Any) -> None:
        self.plan = plan
        self._norm: Tensor | None = None
        super().__init__(*args, **settings)

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Stage 1, once an update."""
        if self.plan.path is not None:
            check(self._norm is None, "did not ask for the norm of the gradients")
            self._norm = self.plan.exchange()
        super().reduce_gradients(pipeline_parallel)

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        if self.plan.path is None:
            super().average_tensor(tensor, communication_data_type)
        else:
            check(self._norm is not None, "averages before reduce_gradients")

    def scaled_global_norm(self, norm_type: float = 2) -> Tensor:
        if self._norm is not None:
            norm, self._norm = self._norm, None
            return norm
        for i, gradients in self.averaged_gradients.items():
            # What is over at the end is padding.
            for parameter, gradient in zip(self.params_in_partition[i], gradients or (), strict=False):
                self.plan.unscale_(gradient, parameter)
        norm = super().scaled_global_norm(norm_type)
        return torch.where(self.plan.unscaling.agree(), torch.inf, norm)


@contextlib.contextmanager
def installed(plan: WholePlan) -> Iterator[None]:
    """Inside, `deepspeed.initialize` makes a ScaledUpdate for the plan."""
    from deepspeed.runtime import engine

    check_overrides(ScaledUpdate)
    kept = engine.DeepSpeedZeroOptimizer

    def make(*args: Any, **settings: Any) -> ScaledUpdate:
        return ScaledUpdate(plan, *args, **settings)

    engine.DeepSpeedZeroOptimizer = make
    try:
        yield
    finally:
        engine.DeepSpeedZeroOptimizer = kept
