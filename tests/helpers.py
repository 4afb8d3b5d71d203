"""Runs a function in several real processes, as a launcher would start them."""

import contextlib
import io
import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path

import torch
from torch.multiprocessing import start_processes

# On a machine with a GPU too: these tests are about ranks, and there may be more ranks than devices.
ENVIRONMENT = {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run_distributed(fn, world_size, *args, timeout=120):
    """Calls `fn(*args)` in `world_size` processes; returns what each rank returned, by rank.

    `fn` is a function at the top of a test module and finds RANK, WORLD_SIZE and the rest in its environment; it joins
    the process group itself (`training.distributed.process_group`). A rank that raises ends the others, and its
    traceback is in the error raised here. After `timeout` seconds all are ended, with a TimeoutError.
    """
    # Forked from a server that never ran a backward pass, with the slow imports done once.
    multiprocessing.set_forkserver_preload(["torch", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"])
    with tempfile.TemporaryDirectory() as folder, _environment(ENVIRONMENT):
        context = start_processes(
            _run_rank,
            args=(fn, args, {"WORLD_SIZE": world_size, "LOCAL_SIZE": world_size, "MASTER_PORT": free_port()}, folder),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    running = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                    raise TimeoutError(f"{fn.__name__}: ranks {running} of {world_size} still run after {timeout} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _run_rank(rank, fn, args, group, folder):
    numbers = {"RANK": rank, "LOCAL_RANK": rank, **group}
    os.environ.update(ENVIRONMENT, **{name: str(value) for name, value in numbers.items()})
    torch.set_num_threads(1)
    torch.save(fn(*args), Path(folder) / str(rank))


@contextlib.contextmanager
def _environment(values):
    """Sets variables for a while; the server of new processes keeps those of its first call."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_weights(run, *, averaged=False):
    """The whole weights by name, of the newest checkpoint of a run folder; their average, where it has one."""
    from dalle_ds.models.weights import open_weights, read_description

    with open_weights(run, read_description(Path(run))["kind"], averaged=averaged) as weights:
        assert weights.is_average or not averaged
        return {name: tensor.clone() for name, tensor in weights.tensors()}


def call_commands(*commands):
    """Runs `dalle-ds` with each list of arguments in turn; returns exit code, standard output and error of each.

    For `run_distributed`: training commands find themselves one of the ranks. All share one process group, since
    DeepSpeed keeps the first for good.
    """
    from dalle_ds import cli
    from dalle_ds.training import distributed

    cli.LATER_RANKS_WAIT = 0.0
    results = []
    with distributed.process_group() as ranks:
        distributed.process_group = lambda timeout_minutes=30.0: contextlib.nullcontext(ranks)
        for arguments in commands:
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                try:
                    code = cli.main([str(argument) for argument in arguments])
                except SystemExit as stop:
                    code = stop.code
            results.append((code, out.getvalue(), err.getvalue()))
    return results
