"""A training session from run folder to last checkpoint; what differs between the stages is handed in as a Stage."""

import dataclasses
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dalle_ds import __version__
from dalle_ds.config import LoopConfig, require
from dalle_ds.training.agreement import from_first, is_first
from dalle_ds.training.averaging import ParameterAverage
from dalle_ds.training.changes import CONFIG, DS_CONFIG, check_changes
from dalle_ds.training.checkpoint import load_weights
from dalle_ds.training.construction import Precision, build_engine
from dalle_ds.training.deepspeed_config import batch_sizes, load_deepspeed_config
from dalle_ds.training.distributed import Ranks
from dalle_ds.training.engine import Engine, n_parameters, whole_model
from dalle_ds.training.histograms import GradientHistograms
from dalle_ds.training.loop import Batch, Step, train
from dalle_ds.training.metrics import MetricsLog, read_metrics, training_progress
from dalle_ds.training.requests import Requests
from dalle_ds.training.run import open_run, write_run
from dalle_ds.training.run_state import RunState
from dalle_ds.training.schedules import LearningRate
from dalle_ds.training.watch import Watch

VERSIONED = ("torch", "deepspeed", "triton", "numpy")


class Reader(Protocol):
    """An iterator over batches that knows where it is, in one state for all ranks, and stops its threads on `close`."""

    def __next__(self) -> Batch: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a training command brings: a model, its data, its step and its schedules."""

    kind: str
    config: Any
    build_model: Callable[[Precision], nn.Module]
    open_reader: Callable[[int], Reader]
    """micro-batch size -> training batches"""
    open_validation: Callable[[int], Iterator[Batch]] | None
    """micro-batch size -> validation batches, always the same ones"""
    step: Callable[[Engine], Step]
    validate: Callable[[Engine, Iterator[Batch], int, int], dict[str, float]]
    """engine, batches, how many of them, step -> figures"""
    sample: Callable[[nn.Module, Path | None], None] | None
    """whole model, path of the PNG to write (None where nothing is to be written); called on every rank"""
    learning_rate: LearningRate
    scalars: Callable[[int], dict[str, float]]
    lr_multiplier: Callable[[str], float]
    """parameter name -> multiple of the learning rate"""
    facts: dict[str, Any]
    """further entries of config.json"""
    averaging: float = 0.0
    """decay of the averaged parameters, which evaluate and sample; 0 for none"""
    averaging_every: int = 1
    """updates between those that the average takes in"""
    histogram_every: int = 0
    """steps between histograms of gradients; 0 for none"""
    resblock_of: Callable[[str], int | None] = lambda name: None
    """parameter name -> number of its resblock, which has a gradient scale of its own"""
    upload: Callable[[Path], None] | None = None
    """what the first rank hands its checkpoints to, and does not wait for"""
    init_from: Callable[[], Path] | None = None
    """finds the checkpoint whose weights a new run begins with; a run that goes on does not ask"""
    write_files: Callable[[Path], None] = lambda run: None
    """run folder -> writes what else belongs into it, before the first step"""

    @property
    def loop(self) -> LoopConfig:
        return self.config.loop  # type: ignore[no-any-return]


def train_stage(
    stage: Stage, ranks: Ranks, *, out: Path, resume: str, deepspeed_config: str, allowed: Sequence[str] = ()
) -> None:
    """Trains the stage into the run folder `out`, going on from its newest checkpoint when `resume` is auto.

    Settings that are `allowed` may be others than the checkpoint's (training/changes.py). Everything that can be
    refused is refused before the run folder is touched. Raises Preempted, having saved, when somebody asks it to stop;
    ends the process when a rank does not come (training/watch.py).
    """
    with Requests(out) as requests, Watch(stage.loop.timeout_minutes) as watch:
        ds_config = load_deepspeed_config(deepspeed_config)
        micro_batch_size, _ = batch_sizes(ds_config, ranks.world_size, deepspeed_config)
        config = dataclasses.asdict(stage.config)
        description = {"kind": stage.kind, "version": __version__, "config": config, **stage.facts}
        checkpoint, weights = open_run(out, resume), None
        if checkpoint is not None:
            check_changes(checkpoint, description, ds_config, ranks.world_size, allowed)
        elif stage.init_from is not None:
            weights = stage.init_from()
        _train(stage, ranks, requests, watch, out, checkpoint, weights, description, ds_config, micro_batch_size)


def _train(
    stage: Stage,
    ranks: Ranks,
    requests: Requests,
    watch: Watch,
    out: Path,
    checkpoint: Path | None,
    weights: Path | None,
    description: dict[str, Any],
    ds_config: dict[str, Any],
    micro_batch_size: int,
) -> None:
    loop = stage.loop
    reader = stage.open_reader(micro_batch_size)
    engine = build_engine(stage.build_model, ds_config, loop.seed, stage.lr_multiplier, stage.resblock_of)
    if weights is not None:
        load_weights(engine, weights)
    average = ParameterAverage(engine, stage.averaging, stage.averaging_every)
    versions = {"python": platform.python_version(), **installed_versions()}
    facts = {"n_parameters": n_parameters(engine), "world_size": ranks.world_size, "versions": versions}
    documents = {CONFIG: description | facts, DS_CONFIG: ds_config}
    state = RunState(engine, average, reader, stage.learning_rate, documents)
    start = 0 if checkpoint is None else state.restore(checkpoint)
    write_run(out, documents, start)
    if ranks.is_first:
        stage.write_files(out)
    metrics = MetricsLog(out / "metrics.jsonl", start) if ranks.is_first else None
    histograms = _open_histograms(engine, stage.histogram_every, out, start)

    def evaluate(step: int) -> None:
        if stage.open_validation is None:
            return
        engine.eval()
        with average.in_use(), torch.no_grad():
            batches = stage.open_validation(micro_batch_size)
            figures = stage.validate(engine, batches, loop.validation_batches, step)
        engine.train()
        if metrics is not None:
            metrics.write(step, "validation", figures)

    def sample(step: int) -> None:
        if stage.sample is not None:
            # Every rank draws, for the layers of a sharded model meet in each forward pass; the first one writes.
            with average.in_use(), whole_model(engine) as model:
                stage.sample(model, out / "samples" / picture_name(step) if ranks.is_first else None)

    def save(step: int) -> None:
        path = state.save(out, step, loop)
        if ranks.is_first and stage.upload is not None:
            stage.upload(path)

    if start == loop.steps:
        # What the end of a run shows, where it died before.
        lacks = from_first(lambda: _find_lacking(out, start), out)
        for name, show in (("validation", evaluate), ("sample", sample)):
            if name in lacks:
                show(start)
    began = time.time()
    with closing(reader), training_progress(stage.kind, loop.steps, start, shown=ranks.is_first) as progress:
        train(
            engine,
            stage.step(engine),
            iter(reader),
            average,
            start=start,
            steps=loop.steps,
            learning_rate=stage.learning_rate,
            scalars=stage.scalars,
            # What is saved is safe from whatever comes after it.
            actions=[(loop.save_every, save), (loop.evaluate_every, evaluate), (loop.sample_every, sample)],
            save=save,
            log_every=loop.log_every,
            metrics=metrics,
            progress=progress,
            requests=requests,
            watch=watch,
            histograms=histograms,
        )
    engine.destroy()
    if ranks.is_first:
        what = f"steps {start + 1} to {loop.steps}" if start < loop.steps else f"nothing to do, {start} steps are done"
        print(f"{out}: {what} in {time.time() - began:.0f} s", flush=True)
        warn_of_skipped(out)


def _find_lacking(out: Path, step: int) -> list[str]:
    """What of the validation and the pictures of a step there is none of."""
    measured = {line["step"] for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "validation"}
    has = {"validation": step in measured, "sample": (out / "samples" / picture_name(step)).exists()}
    return [name for name, is_there in has.items() if not is_there]


def picture_name(step: int) -> str:
    return f"step-{step:08d}.png"


def _open_histograms(engine: Engine, every: int, out: Path, start: int) -> GradientHistograms:
    require(
        every == 0 or engine.extras.unscaling is not None,
        'histogram_every looks at gradients on their way: add the section "mixed_precision": {} to the DeepSpeed JSON',
    )
    log = MetricsLog(out / "histograms.jsonl", start) if every and is_first() else None
    return GradientHistograms.of(engine, every, log)


def warn_of_skipped(out: Path) -> None:
    """Counts what the data loading left out so far; ranks and earlier runs may have named a sample more than once."""
    path = out / "skipped.jsonl"
    if path.exists():
        n_skipped = len(set(path.read_text().splitlines()))
        print(f"warning: {n_skipped} samples or shards were left out; {path} names them", flush=True)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that shape a run, of those that are installed (triton is not, outside Linux)."""
    installed = {found.name: found.version for found in metadata.distributions()}
    return {name: installed[name] for name in VERSIONED if name in installed}
