"""The training loop: one function, in reading order."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.config import Preempted
from dalle_ds.training.averaging import ParameterAverage
from dalle_ds.training.engine import Engine, backward, instruments, set_learning_rate
from dalle_ds.training.histograms import GradientHistograms
from dalle_ds.training.metrics import MetricsLog, TrainingProgress, mean_over_ranks
from dalle_ds.training.requests import Requests
from dalle_ds.training.schedules import LearningRate
from dalle_ds.training.skipped_updates import SkippedUpdates
from dalle_ds.training.watch import Watch

Batch = dict[str, Any]
Step = Callable[[Batch, int, int], dict[str, Tensor]]
Action = tuple[int, Callable[[int], None]]


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


def train(
    engine: Engine,
    step: Step,
    batches: Iterator[Batch],
    average: ParameterAverage,
    *,
    start: int,
    steps: int,
    learning_rate: LearningRate,
    scalars: Callable[[int], dict[str, float]],
    actions: Sequence[Action],
    save: Callable[[int], None],
    log_every: int,
    metrics: MetricsLog | None,
    progress: TrainingProgress | None,
    requests: Requests,
    watch: Watch,
    histograms: GradientHistograms,
) -> None:
    """Trains from step `start` to `steps`.

    `step(batch, step, micro_step)` returns scalar tensors with "loss"; `learning_rate` gives a multiplier of the peak
    and sees each step's loss, `scalars(step)` is what else the log shows; every (every, action) runs after each `every`
    steps, in turn, and at the end whatever its number. Raises Diverged, on every rank, naming the first rank and step
    whose loss was not finite; and Preempted, when somebody asked to stop, after `save` of the step that had ended.
    """
    accumulation = engine.gradient_accumulation_steps()
    window: list[dict[str, Tensor]] = []
    first_bad = torch.full((), math.inf, device=engine.device)
    window_began = time.time()
    skipped = SkippedUpdates(engine)
    for index in range(start, steps):
        watch.beat(index + 1)
        requests.post(index + 1)
        histograms.begin(index + 1, engine.extras.unscaling)
        rate = set_learning_rate(engine, learning_rate.multiplier(index))
        for micro_step in range(accumulation):
            outputs = step(next(batches), index, micro_step)
            backward(engine, outputs["loss"])
            average.wait_for_copy()
            engine.step()
            window.append({name: value.detach().float() for name, value in outputs.items()})
            now_bad = torch.where(torch.isfinite(window[-1]["loss"]), math.inf, float(index + 1))
            first_bad = torch.minimum(first_bad, now_bad)
        # In fp16 a step whose gradients overflow is skipped.
        if engine.was_step_applied():
            average.update()
        done = index + 1
        skipped.see(done)
        histograms.end(done)
        loss = torch.stack([outputs["loss"] for outputs in window[-accumulation:]]).mean()
        if learning_rate.observe(index, loss) and metrics is not None:
            metrics.write(done, "halving", {"by": "plateau", "multiplier": learning_rate.multiplier(done)})
        asked = requests.agreed()
        if asked.halve:
            learning_rate.halve()
            if metrics is not None:
                metrics.write(done, "halving", {"by": "hand", "multiplier": learning_rate.multiplier(done)})
        due = [action for every, action in actions if done == steps or (every and done % every == 0)]
        if done % log_every == 0 or done == steps or due or asked.stop:
            means = mean_over_ranks(window)
            _check_finite(first_bad)
            n_images = len(window) // accumulation * engine.train_batch_size()
            rate_of_images = n_images / (time.time() - window_began)
            values = {**means, "learning_rate": rate, **scalars(index), "images_per_second": rate_of_images}
            if metrics is not None:
                metrics.write(done, "train", {**values, **instruments(engine)})
            if progress is not None:
                progress.update(done, means["loss"], rate_of_images)
            is_stopped = _act(due, done, save, requests, asked=asked.stop, is_last=done == steps)
            if is_stopped:
                raise Preempted(f"saved step {done}; go on with --resume auto")
            window, window_began = [], time.time()


def _act(
    due: Sequence[Callable[[int], None]],
    step: int,
    save: Callable[[int], None],
    requests: Requests,
    *,
    asked: bool,
    is_last: bool,
) -> bool:
    """Does what is due after `step`, or saves and no more once somebody asked to stop; whether somebody did."""
    left, has_saved = list(due), False
    while True:
        if asked:
            # There may be time to save and for no more; but what the end of a run does comes only once.
            rest = [action for action in left if action is not save] if is_last else []
            left = [*([] if has_saved else [save]), *rest]
        if not left:
            return asked
        action = left.pop(0)
        action(step)
        has_saved = has_saved or action is save
        asked = asked or (not is_last and requests.wants_stop())


def _check_finite(first_bad: Tensor) -> None:
    """Raises Diverged on every rank when any rank saw a loss that is not finite."""
    gathered = [torch.zeros_like(first_bad) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, first_bad)
    first_steps = torch.stack(gathered).tolist()
    if min(first_steps) < math.inf:
        rank = first_steps.index(min(first_steps))
        raise Diverged(
            f"the loss was not finite, first on rank {rank} at step {min(first_steps):.0f}: "
            "lower the learning rate, or resume from an earlier checkpoint"
        )
