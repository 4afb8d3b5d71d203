"""metrics.jsonl and the progress line: what a run says of itself while it trains."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from dalle_ds.storage.files import replace_file

# Seconds between lines where the output is no terminal.
PLAIN_INTERVAL = 10.0


class MetricsLog:
    """Appends a JSON object a line to metrics.jsonl; lines past `resume_step` are dropped, as they will come again."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if resume_step else []
        # Time goes on from where the kept part ended.
        self.started = time.time() - (kept[-1]["time"] if kept else 0.0)
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        line = {"step": step, "kind": kind, "time": round(time.time() - self.started, 3), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; empty when there is none. A last line cut by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def mean_over_ranks(figures: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Means of scalar tensors over a sequence of batches and over all ranks, with one transfer to the host."""
    names = list(figures[0])
    means = torch.stack([torch.stack([values[name].float() for values in figures]).mean() for name in names])
    dist.all_reduce(means)
    return dict(zip(names, (means / dist.get_world_size()).tolist(), strict=True))


class TrainingProgress:
    """A rich progress bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, title: str, steps: int, start: int) -> None:
        self.title, self.steps = title, steps
        self.console = Console(stderr=True, soft_wrap=True)
        self.first, self.began, self.last_line = start, time.time(), 0.0
        self.bar: Progress | None = None
        self.task: Any = None

    def update(self, step: int, loss: float, images_per_second: float) -> None:
        text = f"loss {loss:.4f}  {images_per_second:,.1f} images/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
        elif time.time() - self.last_line >= PLAIN_INTERVAL or step == self.steps:
            self.last_line = time.time()
            left = (time.time() - self.began) / max(1, step - self.first) * (self.steps - step)
            self.console.print(f"{self.title}  step {step}/{self.steps}  {text}  {left:.0f} s left", highlight=False)


@contextlib.contextmanager
def training_progress(title: str, steps: int, start: int, *, shown: bool) -> Iterator[TrainingProgress | None]:
    """Shows progress on the first rank; yields None elsewhere."""
    if not shown:
        yield None
        return
    progress = TrainingProgress(title, steps, start)
    if not progress.console.is_terminal:
        yield progress
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=progress.console) as bar:
        progress.bar, progress.task = bar, bar.add_task(title, total=steps, completed=start, text="")
        yield progress
