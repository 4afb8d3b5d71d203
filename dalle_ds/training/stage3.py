"""ZeRO-3 with 16-bit matrices beside 32-bit gains, biases and embeddings, and with a gradient path of our own.

DeepSpeed's stage 3 keeps all weights in one dtype, adds gradients up in a buffer of one dtype, and finds overflows for
all of them at once. Here parameters are stored and travel in their own dtypes (Section 2.4: what stays in 32 bits), the
16-bit ones with a float32 master copy or without one, and gradients go through a `GradientPath`. What is overridden
are private names of DeepSpeed 0.19: see seam.py, and tests/test_construction.py, which would notice if they moved.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import deepspeed.runtime.zero.stage3 as zero3
import torch
from torch import Tensor, nn

from dalle_ds.training.gradient_path import GradientPath, clip_
from dalle_ds.training.seam import check_overrides
from dalle_kernels.compression.zero_hook import scatter_sums


@dataclass(frozen=True, kw_only=True)
class Stage3Plan:
    """What the optimizer is made for."""

    path: GradientPath
    names: Mapping[nn.Parameter, str]
    master_weights: bool
    divisor: float
    """gradients are divided by it before they are summed inside a machine"""
    factor: float
    """what a sum so made is multiplied by to be the mean over all ranks on this machine, loss scales aside"""


class MixedStage3(zero3.DeepSpeedZeroOptimizer_Stage3):  # type: ignore[misc]
    """DeepSpeed's optimizer of stage 3; parameter groups must each have one dtype."""

    plan: Stage3Plan
    dtype: torch.dtype
    master_weights_and_grads_dtype: torch.dtype

    # --- storage: one flat tensor for each parameter group, in its dtype ----------------------------------------------

    def get_param_comm_dtype(self, param: nn.Parameter) -> torch.dtype:
        """Parameters and their gradients travel as they are stored."""
        return param.dtype

    def _get_parameter_partitions(self) -> list[Tensor]:
        self._flats = []
        for group in self.fp16_groups:
            flat = torch.cat([parameter.ds_tensor.data.view(-1) for parameter in group])
            for parameter, part in zip(group, torch.split(flat, [p.ds_tensor.numel() for p in group]), strict=True):
                parameter.ds_tensor.data = part
            self._flats.append(flat)
        return [torch.empty(0)]  # nothing is left for DeepSpeed to flatten

    def _set_fp16_partitioned_groups_flat(self) -> None:
        self.fp16_partitioned_groups_flat.extend(self._flats)

    def _create_fp32_partitions(self) -> None:
        """What the optimizer updates: a float32 copy, or the stored weights themselves."""
        for flat, ids in zip(self.fp16_partitioned_groups_flat, self.fp16_partitioned_groups_flat_id, strict=True):
            is_copied = self.plan.master_weights and flat.dtype != torch.float32
            master = flat.float() if is_copied else flat
            master.ds_id = f"{ids[0]}_{ids[-1]}"
            master.requires_grad = True
            if master.dtype != torch.float32:
                master.grad_dtype = torch.float32  # a 16-bit weight takes a float32 gradient
            self.fp32_partitioned_groups_flat.append(master)
        for group in self.optimizer.param_groups:
            group["params"] = []

    def initialize_optimizer_states(self) -> None:
        """Not before the first step: DeepSpeed would make a buffer for gradients of one dtype."""

    def _setup_for_real_optimizer(self) -> None:
        dtypes = {parameter.dtype for group in self.fp16_groups for parameter in group}
        self.ipg_buckets = {dtype: zero3.IPGBucketZ3() for dtype in dtypes}
        # DeepSpeed took the dtype of its first parameter, an embedding, and by it would leave the loss unscaled.
        self.dtype = torch.float16 if torch.float16 in dtypes else self.dtype
        super()._setup_for_real_optimizer()
        # Gradients add up in the path's buffers.
        nothing = self.grad_partitions_flat_buffer = torch.empty(0, device=self.device)
        for parameter_id in self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition:
            self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[parameter_id] = nothing

    def _fp32_state_allgather(self, param: nn.Parameter, fp32_state_partition: Tensor) -> Tensor:
        """In the dtype of what is gathered; DeepSpeed assumes one for all."""
        kept = self.master_weights_and_grads_dtype
        self.master_weights_and_grads_dtype = fp32_state_partition.dtype
        try:
            return super()._fp32_state_allgather(param, fp32_state_partition)  # type: ignore[no-any-return]
        finally:
            self.master_weights_and_grads_dtype = kept

    # --- gradients ----------------------------------------------------------------------------------------------------

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
        self, params_to_reduce: Sequence[nn.Parameter], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        group = self._get_param_partition_group(params_to_reduce[0])
        return scatter_sums([parameter.grad for parameter in params_to_reduce], group, self.plan.divisor)  # type: ignore[misc]

    def partition_grads(self, params_to_release: Sequence[nn.Parameter], grad_partitions: Sequence[Tensor]) -> None:
        last = self.is_gradient_accumulation_boundary()
        for parameter, gradient in zip(params_to_release, grad_partitions, strict=True):
            if len(gradient):
                # A loss scale of DeepSpeed's own is taken out here too.
                factor = self.plan.factor / float(self.loss_scale)
                self.plan.path.receive(self.plan.names[parameter], gradient, factor, last=last)
            if not zero3.get_accelerator().is_synchronized_device() and parameter.grad is not None:
                parameter.grad.record_stream(zero3.get_accelerator().current_stream())
            parameter.grad = None

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        """Told by the norm."""
        return False

    def _get_norm_groups(self) -> list[Tensor]:
        return [self.plan.path.finish()]

    def _overflow_clean_up(self, prev_scale: float) -> None:
        self.plan.path.discard()
        super()._overflow_clean_up(prev_scale)

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        group, master = self.fp16_groups[sub_group_id], self.fp32_partitioned_groups_flat[sub_group_id]
        names = [self.plan.names[parameter] for parameter in group]
        shapes = [self.plan.path.shares[name].shape for name in names]
        gradient = torch.empty_like(master, dtype=torch.promote_types(master.dtype, torch.float32))
        parts = torch.split(gradient, [parameter.ds_tensor.numel() for parameter in group])
        self.plan.path.take(names, {name: part.view(s) for name, part, s in zip(names, parts, shapes, strict=True)})
        master.grad = gradient
        self.averaged_gradients[sub_group_id] = None

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        """Clips alone: gradients and their norm are unscaled, whatever a loss scale has become since."""
        self._global_grad_norm = total_norm  # DeepSpeed has divided it
        clip_(self.fp32_partitioned_groups_flat[sub_group_id].grad, total_norm, self.clip_grad)

    def _optimizer_step(self, sub_group_id: int) -> None:
        """Shows the optimizer the one group to update: torch's walk through all their groups at each call."""
        groups = self.optimizer.param_groups
        group = groups[self.sub_group_to_group_id[sub_group_id]]
        group["params"] = [self.fp32_partitioned_groups_flat[sub_group_id]]
        self.optimizer.param_groups = [group]
        try:
            self.optimizer.step()
        finally:
            group["params"] = []
            self.optimizer.param_groups = groups


@contextlib.contextmanager
def installed(plan: Stage3Plan) -> Iterator[None]:
    """Inside, `deepspeed.initialize` makes a MixedStage3 for the plan."""
    check_overrides(MixedStage3)
    kept = zero3.DeepSpeedZeroOptimizer_Stage3
    # A class, for DeepSpeed may derive from it.
    zero3.DeepSpeedZeroOptimizer_Stage3 = type("PlannedStage3", (MixedStage3,), {"plan": plan})
    try:
        yield
    finally:
        zero3.DeepSpeedZeroOptimizer_Stage3 = kept
