"""Checkpoints of a run: all that it needs to go on, on as many processes and in whatever sharding it is resumed.

checkpoints/step-00000500/
    complete.json         size and SHA-256 of every file: what lacks it is no checkpoint
    config.json           what the run was asked to be, and ds_config.json beside it
    state.json            the caller's state, the same on all ranks (data position, schedules, scales)
    engine.json           counters and loss scale
    shards/*.safetensors  weights, their average, moments and what else is kept for each element, by those who hold it
    ranks/*.safetensors   what each rank has of its own (generators), for a resume on as many

Nothing is gathered: each rank writes what it holds, once, and storage/pieces.py puts it together again.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dalle_ds.storage import folders
from dalle_ds.storage.files import PARTIAL, Record, measure, write_json
from dalle_ds.storage.folders import SHARDS, read_marker
from dalle_ds.storage.pieces import AVERAGE, WEIGHT, Entry, Piece, PieceReader, write_pieces, write_tensors
from dalle_ds.training import engine_state
from dalle_ds.training.agreement import is_first, own_share, together
from dalle_ds.training.engine import Engine
from dalle_ds.training.whole_weights import fill_model

STATE, ENGINE, RANKS = "state.json", "engine.json", "ranks"
Load = Callable[[dict[str, Any], PieceReader], None]


def save_checkpoint(
    engine: Engine,
    run: Path,
    step: int,
    state: dict[str, Any],
    keep: int,
    *,
    keep_every: int = 0,
    pieces: Iterable[Piece] = (),
    rank_state: dict[str, Tensor] | None = None,
    documents: Mapping[str, Any] | None = None,
) -> Path:
    """Writes checkpoint `step` of the run, checks it and gives it its name; every rank must call. Returns its folder.

    `state` is JSON-able and the same on all ranks, as are `documents`, further JSON files by name; `pieces` are further
    pieces of parameters that this rank holds (those of ranks that hold copies are left out); `rank_state` is of this
    rank alone. Then all checkpoints go but the newest `keep` and those whose step is a multiple of `keep_every`, where
    that is not 0.

    When something fails, on any rank, all ranks raise and earlier checkpoints stay: InputError for a full disk.
    """
    # Making them may take all ranks, and those that hold copies must not be missing.
    pieces = list(pieces)
    partial = run / folders.CHECKPOINTS / f"step-{step:08d}{PARTIAL}"
    documents = {STATE: state, ENGINE: engine_state.take_counters(engine), **(documents or {})}
    try:
        together(lambda: _begin(run, step), partial)
        parts = together(lambda: _write_own(engine, partial, documents, pieces, rank_state or {}), partial)
        records = {name: record for own in parts for name, record in own.items()}
        together(lambda: _read_again(partial, {name: records[name] for name in own_share(records)}), partial)
        written = {"step": step, "world_size": dist.get_world_size(), "files": records}
        together(lambda: folders.publish(partial, written) if is_first() else None, partial)
    except BaseException:
        # Every rank has failed, or is ended: nobody writes there any more.
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if is_first():
        folders.retain(run, step, keep, keep_every)
    dist.barrier()
    return partial.with_name(partial.name.removesuffix(PARTIAL))


def _begin(run: Path, step: int) -> None:
    if is_first():
        folder = folders.begin(run, step)
        for name in (SHARDS, RANKS):
            (folder / name).mkdir()


def _write_own(
    engine: Engine,
    folder: Path,
    documents: Mapping[str, Any],
    pieces: Iterable[Piece],
    rank_state: dict[str, Tensor],
) -> dict[str, Record]:
    """This rank's files of a checkpoint; returns their records by name."""
    records = {}
    if engine_state.is_writer(engine):
        name = f"{SHARDS}/shard-{dist.get_rank():05d}.safetensors"
        held = [*engine_state.take_pieces(engine), *pieces]
        records[name] = write_pieces(folder / name, held, engine_state.take_scalars(engine))
    if rank_state:
        name, own = _rank_file(), dict(sorted(rank_state.items(), key=lambda item: -item[1].dtype.itemsize))
        entries = [Entry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in own.items()]
        records[name] = write_tensors(folder / name, entries, own.values())
    if is_first():
        records |= {name: write_json(folder / name, content) for name, content in documents.items()}
    return records


def _read_again(folder: Path, records: dict[str, Record]) -> None:
    for name, record in records.items():
        if measure(folder / name) != record:
            raise OSError(f"{folder / name} does not hold what was written to it: the disk may be failing")


def load_checkpoint(
    engine: Engine, folder: Path, load: Load = lambda state, pieces: None
) -> tuple[int, dict[str, Any]]:
    """Restores the engine from a complete checkpoint; every rank must call. Returns its step and its state.

    `load(state, pieces)` takes up what else was saved, and must not ask other ranks. The checkpoint may have been
    written by any number of processes, under any ZeRO stage. Raises InputError, on every rank, for one of another
    version and for one that is not of this model, or lacks parts of it.
    """
    folders.check_format(folder)
    state = json.loads((folder / STATE).read_text())

    def take(pieces: PieceReader) -> None:
        engine_state.put_pieces(engine, pieces)
        engine_state.put_counters(engine, json.loads((folder / ENGINE).read_text()))
        load(state, pieces)

    _fill(engine, folder, take)
    return read_marker(folder)["step"], state


def load_weights(engine: Engine, folder: Path) -> None:
    """Begins at the weights of a checkpoint, at their average where it has one; every rank must call.

    Raises InputError, on every rank, as `load_checkpoint` does.
    """
    folders.check_format(folder)

    def take(pieces: PieceReader) -> None:
        engine_state.put_weights(engine, pieces, AVERAGE if pieces.has(AVERAGE) else WEIGHT)

    _fill(engine, folder, take)


def _fill(engine: Engine, folder: Path, take: Callable[[PieceReader], None]) -> None:
    """Has each rank take its own of a checkpoint's pieces, and the model what the optimizers then hold."""

    def fill() -> None:
        with folders.open_pieces(folder) as pieces:
            pieces.check_fit(engine_state.sizes(engine))
            take(pieces)

    together(fill, folder)
    fill_model(engine)


def load_rank_state(folder: Path) -> dict[str, Tensor] | None:
    """What this rank had of its own; None when the checkpoint is of another number of processes."""
    from safetensors.torch import load_file

    marker = read_marker(folder)
    if marker["world_size"] != dist.get_world_size():
        return None
    return load_file(folder / _rank_file()) if _rank_file() in marker["files"] else {}


def _rank_file() -> str:
    return f"{RANKS}/rank-{dist.get_rank():05d}.safetensors"
