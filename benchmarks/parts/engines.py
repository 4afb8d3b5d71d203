"""Real DeepSpeed engines in the benchmarks of 16-bit training: ZeRO-3 in a process of its own, one after the other.

Arms of a benchmark differ in sections of the DeepSpeed JSON and in nothing else: the same seed gives the same first
weights and batches.
"""

import contextlib
import copy
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from parts.demo_tokens import TEXT_LEN, Tokens
from torch import nn

from dalle_ds.config import PriorConfig
from dalle_ds.models.gradient_scaling import resblock_index
from dalle_ds.models.prior import Prior
from dalle_ds.training.engine import Engine

GROUP = contextlib.ExitStack()
ADAMW = {"betas": [0.9, 0.96], "eps": 1e-8, "weight_decay": 4.5e-2}  # Appendix B.2


def in_processes(function: Callable[[Any], Any], tasks: Iterable[Any], processes: int) -> Iterator[Any]:
    """What `function` returns for each task, in order; each process has one thread and a process group of its own."""
    if processes == 1:
        join()
        yield from map(function, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(processes, join) as pool:
        yield from pool.imap(function, tasks)


def join() -> None:
    """Makes this process a process group of one, with one thread, until it ends."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if torch.distributed.is_initialized():
        return
    from deepspeed.utils import logger

    from dalle_ds.training.distributed import process_group

    logger.setLevel(logging.ERROR)
    GROUP.enter_context(process_group())


def prior_config(tokens: Tokens, n_layer: int, n_head: int, head_dim: int) -> PriorConfig:
    return PriorConfig(
        text_vocab_size=tokens.text_vocab_size,
        text_len=TEXT_LEN,
        image_vocab_size=tokens.image_vocab_size,
        grid_size=tokens.grid_size,
        n_layer=n_layer,
        n_head=n_head,
        head_dim=head_dim,
    )


def ds_config(batch_size: int, learning_rate: float, changes: Mapping[str, Any]) -> dict[str, Any]:
    """float32 AdamW at stage 3 in the paper's settings, but for the sections in `changes`."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_clipping": 4.0,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False, "overlap_comm": False},
        **copy.deepcopy(dict(changes)),
    }
    config["optimizer"]["params"] = {"lr": learning_rate, **ADAMW, **config["optimizer"]["params"]}
    return config


def make_engine(
    model: PriorConfig,
    config: dict[str, Any],
    seed: int,
    *,
    lr_multiplier: Callable[[str], float] = lambda name: 1.0,
    finish: Callable[[Prior], None] = lambda prior: None,
) -> Engine:
    """An engine as training makes it; `finish` may change the model before DeepSpeed has it."""
    from dalle_ds.training.construction import Precision, build_engine

    def build(precision: Precision) -> nn.Module:
        prior = Prior(model, matrix_dtype=precision.matrix_dtype, compute_dtype=precision.compute_dtype)
        finish(prior)
        return prior

    return build_engine(build, config, seed, lr_multiplier, resblock_index)


def matrix_state_bytes(engine: Engine) -> dict[str, float]:
    """What is held for each parameter of the resblocks' matrices, after an update, by kind; all on this process."""
    zero, path = engine.optimizer, engine.extras.path
    sizes = {name: parameter.ds_numel for name, parameter in engine.module.named_parameters()}
    n_matrix = sum(sizes[name] for name, p in engine.module.named_parameters() if _is_in_16_bits(name, p))
    n_other = sum(sizes.values()) - n_matrix
    pairs = list(zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True))
    states = [value for state in zero.optimizer.state.values() for value in state.values()]
    totals = {
        "weights": sum(weight.nbytes for weight, _ in pairs),
        "float32 copies": sum(copy.nbytes for weight, copy in pairs if copy.data_ptr() != weight.data_ptr()),
        "moments": sum(state.nbytes for state in states if torch.is_tensor(state) and state.dim() > 0),
        "gradients": (zero.grad_partitions_flat_buffer if path is None else path.compressor).nbytes,
    }
    # Without our sections DeepSpeed holds the same for all; with them what is no matrix has float32 of everything.
    of_others = {"float32 copies": 4 if path is None else 0, "moments": 8}
    return {kind: (total - of_others.get(kind, 4) * n_other) / n_matrix for kind, total in totals.items()}


def _is_in_16_bits(name: str, parameter: Any) -> bool:
    return resblock_index(name) is not None and len(parameter.ds_shape) > 1
