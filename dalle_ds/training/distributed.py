"""Processes: starting and ending the process group under any launcher, or none."""

import contextlib
import datetime
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dalle_ds.config import Preempted

# Minutes that a collective outlasts the timeout, so that the watch over the ranks (training/watch.py) can speak first.
MARGIN = 1.0


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: its rank, how many there are, its rank on this machine, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def process_group(timeout_minutes: float = 30.0) -> Iterator[Ranks]:
    """Joins the process group that the launcher describes (or one of a single process) and leaves it at the end.

    Collectives that wait longer than a minute over `timeout_minutes` fail, in whatever group.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # torch 2.13 warns at every collective that DeepSpeed calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch")
    _set_single_process_defaults()
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        _prepare_cpu(accelerator)
        device = torch.device("cpu")
    else:
        accelerator.set_device(local_rank)
        # Sums of products of 16-bit matrices are kept in float32 throughout; torch lets parts of them be in 16 bits.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        device = torch.device(accelerator.device_name(local_rank))
    timeout = datetime.timedelta(minutes=timeout_minutes + MARGIN)
    # The groups that are made later, DeepSpeed's own among them, take torch's defaults: 10 minutes for NCCL.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    together = False
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)
        together = True
    except Preempted:
        together = True
        raise
    finally:
        if dist.is_initialized():
            # A rank that fails must not wait for the others in a barrier: the launcher ends them.
            if together:
                dist.barrier()
            dist.destroy_process_group()


def _set_single_process_defaults() -> None:
    """Makes a plain `python launch/train_prior.py` a process group of one, on a free port."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**defaults, "MASTER_PORT": port}.items():
        os.environ.setdefault(name, str(value))


def _prepare_cpu(accelerator: object) -> None:
    """Lets DeepSpeed run on CPU without compiling its shared-memory operator, which only inference uses."""
    # `import deepspeed.comm.torch` would bind the real torch module, so the module table is asked.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    # fp16 runs on any CPU, slowly; DeepSpeed asks for native instructions.
    accelerator.is_fp16_supported = lambda: True  # type: ignore[attr-defined]
    if "OMP_NUM_THREADS" not in os.environ:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
