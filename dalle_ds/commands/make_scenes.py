"""Makes a data set of captioned pictures whose truth is known, as webdataset shards. No download is needed.

    dalle-ds make-scenes data/scenes --n_train 20000 --image_size 64

writes data/scenes/{train,validation,held_out}/00000.tar ..., scenes.json (the settings) and
held_out_combinations.json: (colour, shape) pairs and (colour, shape, place) triples that train and validation never
show, and of which every picture of held_out has one. The same seed makes the same bytes.
"""

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dalle_ds.config import FULL_DISK, InputError, SceneConfig, require
from dalle_ds.flags import add_flags, apply_flags

MAX_WORKERS = 8
STAGING = ".partial"  # inside OUT, so that renaming is enough to finish
FILES = ("train", "validation", "held_out", "scenes.json", "held_out_combinations.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; made when it does not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that OUT already holds")
    add_flags(parser, SceneConfig())


def run(args: argparse.Namespace) -> None:
    config = apply_flags(SceneConfig(), args)
    check_folder(args.out, args.overwrite)
    make_scenes(args.out, config)
    counts = f"{config.n_train:,} train, {config.n_validation:,} validation, {config.n_held_out:,} held_out"
    print(f"{args.out}: {counts} pictures of {config.image_size} x {config.image_size}")


def check_folder(out: Path, overwrite: bool) -> None:
    """Raises InputError when `out` holds anything, unless `overwrite`; then only our own files will be replaced."""
    if not out.exists():
        return
    require(out.is_dir(), f"{out} is a file: name a folder")
    held = sorted(path.name for path in out.iterdir() if path.name != STAGING)
    if held and not overwrite:
        raise InputError(f"{out} is not empty (it holds {held[0]}): name another folder, or give --overwrite")
    if held and "scenes.json" not in held:
        raise InputError(
            f"{out} holds {held[0]} but no scenes.json, so it is not ours to overwrite: name another folder"
        )


def make_scenes(out: Path, config: SceneConfig) -> None:
    """Writes the data set; until all of it is complete, `out` keeps what it held before."""
    from dalle_ds.data.writer import MAX_SAMPLES_PER_SHARD

    require(config.seed >= 0, f"seed {config.seed} must not be negative")
    require(
        config.samples_per_shard <= MAX_SAMPLES_PER_SHARD,
        f"samples_per_shard {config.samples_per_shard} must be at most {MAX_SAMPLES_PER_SHARD}",
    )
    existed = out.exists()
    staging = out / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        _write_settings(staging, config)
        _write_shards(staging, config)
        for name in FILES:
            _replace(staging / name, out / name)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise InputError(
                f"{out}: the disk is full; free some space or write elsewhere (nothing was kept)"
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed and out.exists() and not any(out.iterdir()):
            out.rmdir()


def _write_settings(folder: Path, config: SceneConfig) -> None:
    from dalle_ds.data.scenes import held_out_combinations

    held_out = held_out_combinations(config.seed)
    lists = {"pairs": sorted(held_out.pairs), "triples": sorted(held_out.triples)}
    (folder / "scenes.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    (folder / "held_out_combinations.json").write_text(json.dumps(lists, indent=2) + "\n")


def _write_shards(folder: Path, config: SceneConfig) -> None:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    tasks = list(_shards(config))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    n_worker = min(MAX_WORKERS, os.cpu_count() or 1, len(tasks))
    with Progress(*columns) as progress:
        bar = progress.add_task("making scenes", total=sum(task[3] for task in tasks))
        if n_worker <= 1:
            for task in tasks:
                progress.advance(bar, _write_one(folder, config, task))
            return
        # Fresh processes: a fork would copy the threads' locks of whatever the caller has loaded.
        with ProcessPoolExecutor(n_worker, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(_write_one, folder, config, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    progress.advance(bar, future.result())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _shards(config: SceneConfig) -> Iterator[tuple[str, int, int, int]]:
    """Split, shard number, index of its first picture, number of pictures: one task each."""
    for split, n in (("train", config.n_train), ("validation", config.n_validation), ("held_out", config.n_held_out)):
        for shard, start in enumerate(range(0, n, config.samples_per_shard)):
            yield split, shard, start, min(config.samples_per_shard, n - start)


def _write_one(folder: Path, config: SceneConfig, task: tuple[str, int, int, int]) -> int:
    from dalle_ds.data.scene_captions import make_sample
    from dalle_ds.data.writer import write_shard

    split, shard, start, n = task
    write_shard(folder / split, shard, (make_sample(config, split, index) for index in range(start, start + n)))
    return n


def _replace(source: Path, target: Path) -> None:
    """Moves `source` to `target`; what was there goes, even when there is no source (a split of no pictures)."""
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    if source.exists():
        source.rename(target)
