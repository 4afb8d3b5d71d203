"""Checkpoints of a run: all that it needs to go on, on as many processes and in whatever sharding it is resumed.

checkpoints/step-00000500/
    complete.json         size and SHA-256 of every file: what lacks it is no checkpoint
    state.json            the caller's state, the same on all ranks (data position, schedules, scales)
    engine.json           counters and loss scale
    shards/*.safetensors  weights, moments and what else is kept for each element, by those who hold it (portable.py)
    ranks/*.safetensors   what each rank has of its own (generators), for a resume on as many
    model.safetensors     the whole weights by name, float32; averaged.safetensors their average: what is loaded later
"""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.config import FULL_DISK, InputError
from dalle_ds.training import engine_state, folders
from dalle_ds.training.averaging import ParameterAverage
from dalle_ds.training.engine import Engine
from dalle_ds.training.folders import complete_checkpoints, read_marker
from dalle_ds.training.portable import (
    Entry,
    Piece,
    PieceReader,
    Record,
    measure,
    write_json,
    write_pieces,
    write_tensors,
)
from dalle_ds.training.whole_weights import fill_model, whole_weights

WEIGHTS = "model.safetensors"
AVERAGED = "averaged.safetensors"
STATE, ENGINE = "state.json", "engine.json"
SHARDS, RANKS = "shards", "ranks"
# Free bytes under which a failed write is put down to a full disk: what is left is less than a file's next block.
FULL_BELOW = 2**20

Result = TypeVar("Result")

__all__ = ["complete_checkpoints", "load_checkpoint", "load_rank_state", "open_pieces", "save_checkpoint"]


def save_checkpoint(
    engine: Engine,
    run: Path,
    step: int,
    state: dict[str, Any],
    keep: int,
    average: ParameterAverage,
    *,
    keep_every: int = 0,
    pieces: Iterable[Piece] = (),
    rank_state: dict[str, Tensor] | None = None,
) -> Path:
    """Writes checkpoint `step` of the run, checks it and gives it its name; every rank must call. Returns its folder.

    `state` is JSON-able and the same on all ranks; `pieces` are further pieces of parameters that this rank holds
    (those of ranks that hold copies are left out); `rank_state` is of this rank alone. Then all checkpoints go but
    the newest `keep` and those whose step is a multiple of `keep_every`, where that is not 0.

    When something fails, on any rank, all ranks raise and earlier checkpoints stay: InputError for a full disk.
    """
    # Making them may take all ranks, and those that hold copies must not be missing.
    pieces = list(pieces)
    partial = run / "checkpoints" / f"step-{step:08d}{folders.PARTIAL}"
    try:
        _together(lambda: _begin(run, step), partial)
        records = _write(engine, partial, state, average, pieces, rank_state or {})
        written = {"step": step, "world_size": dist.get_world_size(), "files": records}
        _together(lambda: folders.publish(partial, written) if dist.get_rank() == 0 else None, partial)
    except BaseException:
        # Every rank has failed, or is ended: nobody writes there any more.
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if dist.get_rank() == 0:
        folders.retain(run, step, keep, keep_every)
    dist.barrier()
    return partial.with_name(partial.name.removesuffix(folders.PARTIAL))


def _begin(run: Path, step: int) -> None:
    if dist.get_rank() == 0:
        folder = folders.begin(run, step)
        for name in (SHARDS, RANKS):
            (folder / name).mkdir()


def _write(
    engine: Engine,
    folder: Path,
    state: dict[str, Any],
    average: ParameterAverage,
    pieces: Iterable[Piece],
    rank_state: dict[str, Tensor],
) -> dict[str, Record]:
    """The files of a checkpoint, each read again after it was written; returns their records by name, on every rank."""
    rank = dist.get_rank()

    def write_own() -> dict[str, Record]:
        records = {}
        if engine_state.is_writer(engine):
            name = f"{SHARDS}/shard-{rank:05d}.safetensors"
            held = [*engine_state.take_pieces(engine), *pieces]
            records[name] = write_pieces(folder / name, held, engine_state.take_scalars(engine))
        if rank_state:
            name, own = _rank_file(), dict(sorted(rank_state.items(), key=lambda item: -item[1].dtype.itemsize))
            entries = [Entry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in own.items()]
            records[name] = write_tensors(folder / name, entries, own.values())
        if rank == 0:
            records[STATE] = write_json(folder / STATE, state)
            records[ENGINE] = write_json(folder / ENGINE, engine_state.take_counters(engine))
        return records

    def measure_rest() -> dict[str, Record]:
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        return {name: measure(folder / name) for name in own_share(found - set(records))}

    records: dict[str, Record] = {}
    for write in (write_own, lambda: _write_weights(engine, folder / WEIGHTS)):
        records |= _merge(_together(write, folder))
    _together(lambda: average.save(folder / AVERAGED), folder)
    rest = _merge(_together(measure_rest, folder))
    _together(lambda: _read_again(folder, {name: records[name] for name in own_share(records)}), folder)
    return records | rest


def _merge(of_ranks: list[dict[str, Record]]) -> dict[str, Record]:
    return {name: record for own in of_ranks for name, record in own.items()}


def _write_weights(engine: Engine, path: Path) -> dict[str, Record]:
    """The whole weights by name, a parameter at a time, on rank 0; the others take part in gathering them."""
    weights = whole_weights(engine)
    try:
        if dist.get_rank() == 0:
            shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters()}
            entries = [Entry(name, torch.float32, shape) for name, shape in shapes.items()]
            return {path.name: write_tensors(path, entries, (weight for _, weight in weights))}
    finally:
        # The other ranks meet this one at every parameter, whatever became of the file.
        for _ in weights:
            pass
    return {}


def _read_again(folder: Path, records: dict[str, Record]) -> None:
    for name, record in records.items():
        if measure(folder / name) != record:
            raise OSError(f"{folder / name} does not hold what was written to it: the disk may be failing")


def own_share(names: Iterable[str]) -> list[str]:
    """Every world_size-th name: what this rank looks after."""
    return sorted(names)[dist.get_rank() :: dist.get_world_size()]


# --- loading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(engine: Engine, folder: Path, average: ParameterAverage) -> tuple[int, dict[str, Any]]:
    """Restores engine and average from a complete checkpoint; every rank must call. Returns its step and its state.

    It may have been written by any number of processes, under any ZeRO stage. Raises InputError, on every rank, for one
    that an earlier version wrote and for one that lacks parameters of this model.
    """
    check_format(folder)

    def fill() -> None:
        with open_pieces(folder) as reader:
            engine_state.put_pieces(engine, reader)
        engine_state.put_counters(engine, json.loads((folder / ENGINE).read_text()))

    _together(fill, folder)
    fill_model(engine)
    average.load(folder / AVERAGED)
    return read_marker(folder)["step"], json.loads((folder / STATE).read_text())


def check_format(folder: Path) -> None:
    """Raises InputError for a checkpoint of another version of the format."""
    if read_marker(folder).get("format") != folders.FORMAT:
        raise InputError(
            f"{folder} was written by an earlier version, which kept DeepSpeed's own shards: "
            "go on with that version, or choose a new --out"
        )


def open_pieces(folder: Path) -> PieceReader:
    """All pieces of parameters in a complete checkpoint: use it in a `with` statement."""
    names = [name for name in read_marker(folder)["files"] if name.startswith(f"{SHARDS}/")]
    return PieceReader(folder / name for name in sorted(names))


def load_rank_state(folder: Path) -> dict[str, Tensor] | None:
    """What this rank had of its own; None when the checkpoint is of another number of processes."""
    from safetensors.torch import load_file

    marker = read_marker(folder)
    if marker["world_size"] != dist.get_world_size():
        return None
    return load_file(folder / _rank_file()) if _rank_file() in marker["files"] else {}


def _rank_file() -> str:
    return f"{RANKS}/rank-{dist.get_rank():05d}.safetensors"


# --- one for all ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failure:
    said: str
    is_full: bool
    is_input: bool


def _gather(value: Result) -> list[Result]:
    """The value of every rank, in their order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _together(action: Callable[[], Result], folder: Path) -> list[Result]:
    """What `action` returns on every rank; when it fails on any rank, an error on all of them."""
    failure, own_error, result = None, None, None
    try:
        result = action()
    except Exception as error:
        own_error = error
        failure = _Failure(f"{type(error).__name__}: {error}", _is_full(error, folder), isinstance(error, InputError))
    outcomes = _gather((failure, result))
    failures = {rank: failure for rank, (failure, _) in enumerate(outcomes) if failure is not None}
    if not failures:
        return [value for _, value in outcomes]  # type: ignore[misc]
    if any(failure.is_full for failure in failures.values()):
        name = folder.name.removesuffix(folders.PARTIAL)
        raise InputError(
            f"{folder.with_name(name)}: the disk is full; free some space and go on with --resume auto; "
            "--loop.keep may be lower"
        ) from own_error
    if own_error is not None:
        raise own_error
    rank, failure = min(failures.items())
    if failure.is_input:
        raise InputError(failure.said.removeprefix("InputError: "))
    raise RuntimeError(f"{folder}: rank {rank} failed: {failure.said}")


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether an error comes from a full disk; safetensors has one of its own for it."""
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    if isinstance(error, InputError):
        return False
    return shutil.disk_usage(folder if folder.exists() else folder.parent.parent).free < FULL_BELOW
