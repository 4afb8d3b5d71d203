"""The ranks of a training command as processes of their own, forked from a server that has done the slow imports."""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dalle_ds.cli import PREEMPTED

# What a rank imports before its first step; the server does it once.
PRELOADED = (
    "torch",
    "torch.distributed.fsdp",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles, and so brings in torch's compiler
    "sentencepiece",
    "safetensors.torch",
    "dalle_ds.cli",
    "dalle_ds.commands.train_prior",
    "dalle_ds.data.pipeline",
    "dalle_ds.data.token_shards",
    "dalle_ds.data.upload",
    "dalle_ds.models.prior",
    "dalle_ds.models.weights",
    "dalle_ds.training.session",
    "dalle_ds.training.stage3",
    "dalle_kernels.attention.cpu",
)
# Of the server too, which keeps the variables of its first call.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
# Done, and asked to stop: the other ranks are about to end too.
ORDERLY = (0, PREEMPTED)
POLL = 0.01  # seconds


class Ranks:
    """`dalle-ds` with `arguments` on `world_size` processes, which write to the file `log`; a context manager.

    As under a launcher, but for the launcher: `end` does its part.
    """

    def __init__(self, arguments: Sequence[str], world_size: int, log: Path) -> None:
        os.environ.update(ENVIRONMENT)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        group = {"WORLD_SIZE": world_size, "LOCAL_SIZE": world_size, "MASTER_PORT": _free_port()}
        self.processes = [
            context.Process(target=_be_rank, args=(list(arguments), {"RANK": r, "LOCAL_RANK": r, **group}, str(log)))
            for r in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def send(self, rank: int, number: signal.Signals) -> None:
        process = self.processes[rank]
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, number)

    def codes(self) -> list[int | None]:
        """Exit codes: minus a signal's number, None where a rank still runs."""
        return [process.exitcode for process in self.processes]

    def has_ended(self) -> bool:
        """Whether any rank has."""
        return any(code is not None for code in self.codes())

    def end(self, seconds: float, patience: float) -> list[int]:
        """The exit codes when all have ended, as a launcher sees to it.

        When a rank has failed, those that run `patience` seconds later are killed; all are after `seconds`.
        """
        deadline = time.monotonic() + seconds
        has_failed = False
        while None in self.codes() and time.monotonic() < deadline:
            if not has_failed and any(code not in (None, *ORDERLY) for code in self.codes()):
                has_failed, deadline = True, min(deadline, time.monotonic() + patience)
            time.sleep(POLL)
        self.__exit__()
        return [code for code in self.codes() if code is not None]


def _be_rank(arguments: list[str], variables: dict[str, object], log: str) -> None:
    import torch

    from dalle_ds import cli

    # What the server has made is not looked at again by every collection.
    gc.freeze()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.environ.update(ENVIRONMENT, **{name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    sys.exit(cli.main(arguments))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
