"""Checkpoints of a run: DeepSpeed's shards, the whole weights and their average, where the data are, and a marker.

checkpoints/step-00000500/ is complete when it holds complete.json, which is written last.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dalle_ds.config import FULL_DISK, InputError
from dalle_ds.training.averaging import ParameterAverage
from dalle_ds.training.engine import Engine, gather_weights

MARKER = "complete.json"
WEIGHTS = "model.safetensors"
AVERAGED = "averaged.safetensors"
STATE = "state.json"
ENGINE_TAG = "engine"
# Free bytes under which a failed write is put down to a full disk: what is left is less than a file's next block.
FULL_BELOW = 2**20
# Seconds that a rank whose checkpoint another one has removed leaves to that one to say why; the launcher then ends it.
OTHERS_SPEAK = 10.0


def save_checkpoint(
    engine: Engine, run: Path, step: int, state: dict[str, Any], keep: int, average: ParameterAverage
) -> Path:
    """Writes checkpoint `step` of the run with `state`, the same on all ranks, then drops all but the newest `keep`.

    When writing fails nothing half-written stays; a full disk is an InputError.
    """
    folder = _folder(run, step)
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    try:
        _write(engine, folder, step, state, average)
    except BaseException as error:
        others_fault = isinstance(error, Exception) and not folder.exists()
        full = getattr(error, "errno", None) in FULL_DISK
        # torch and safetensors have errors of their own for a full disk.
        if not isinstance(error, OSError) and not others_fault:
            full = shutil.disk_usage(run).free < FULL_BELOW
        shutil.rmtree(folder, ignore_errors=True)
        if others_fault and not full:
            time.sleep(OTHERS_SPEAK)
            raise InputError(
                f"{folder}: another process could not write it and says why; then go on with --resume auto"
            ) from error
        if full:
            raise InputError(
                f"{folder}: the disk is full; free some space and go on with --resume auto; --loop.keep may be lower"
            ) from error
        raise
    if dist.get_rank() == 0:
        for old in complete_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return folder


def _write(engine: Engine, folder: Path, step: int, state: dict[str, Any], average: ParameterAverage) -> None:
    """The files of a checkpoint, the marker last, when every rank has written what is its own."""
    from safetensors.torch import save_file

    engine.save_checkpoint(str(folder), tag=ENGINE_TAG, client_state={"step": step}, save_latest=False)
    weights = gather_weights(engine)
    if dist.get_rank() == 0:
        (folder / STATE).write_text(json.dumps(state))
        save_file(weights, folder / WEIGHTS)
    del weights
    average.save(folder / AVERAGED)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / MARKER).write_text(json.dumps({"step": step, "world_size": dist.get_world_size()}))


def load_checkpoint(engine: Engine, folder: Path, average: ParameterAverage) -> tuple[int, dict[str, Any]]:
    """Restores engine and average from a complete checkpoint; returns its step and its state.

    Raises InputError when it is of another number of processes, or of a version that kept its state otherwise.
    """
    if not (folder / STATE).exists():
        raise InputError(
            f"{folder} was written by an earlier version, which kept the place in the data for each process: "
            "go on with that version, or choose a new --out"
        )
    marker = json.loads((folder / MARKER).read_text())
    if marker["world_size"] != dist.get_world_size():
        raise InputError(
            f"{folder} was written by {marker['world_size']} processes and this run has {dist.get_world_size()}: "
            f"start {marker['world_size']} processes, or choose a new --out"
        )
    engine.load_checkpoint(str(folder), tag=ENGINE_TAG)
    average.load(folder / AVERAGED)
    return marker["step"], json.loads((folder / STATE).read_text())


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of the run, oldest first."""
    return sorted(marker.parent for marker in run.glob(f"checkpoints/step-*/{MARKER}"))


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"
