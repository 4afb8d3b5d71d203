"""What the paper says of compressed gradients, put to the test in minutes (section 2.5, Appendix E, footnote 10).

    python benchmarks/compression_claims.py [--quick]

The claims: at the paper's ratio of rank to width the loss is that without compression; a Q that is drawn once serves as
well as one that warm-starts, and better than one that is drawn anew at each update; and error buffers must not be
zeroed. A tiny prior learns made scenes through the engine of training, ZeRO-3 inside machines and PowerSGD between
them; a seed gives all arms the same first weights and batches. Each run is one process, so one machine of one shard:
gradients that many machines would average are here averaged by the batch, which for PowerSGD, linear in them, is the
same. A quarter of that rank, where more is left out, is there for what the paper's ratio is too kind to show.
Writes benchmarks/results/<date>-compression-claims.md and .png.
"""

import argparse
import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts.demo_tokens import Tokens
from parts.engines import ds_config, in_processes, make_engine
from parts.measuring import describe_machine
from parts.scene_tokens import make_tokens
from rich.progress import track

from dalle_ds.config import PriorConfig
from dalle_ds.training.engine import backward, set_learning_rate
from dalle_ds.training.schedules import warmup_cosine

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 0.01  # of the loss without compression
FINAL_RATE = 0.02  # of the peak


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to average gradients; `matrix_rank` is a fraction of the width, 0 for no compression."""

    label: str
    rank_to_width: float
    changes: dict[str, Any] = field(default_factory=dict)


PAPERS, LOW = 1 / 4, 1 / 16  # Table 1: 512 / 1920 = 0.27, 640 / 2688 = 0.24, 896 / 3968 = 0.23
ARMS = {
    "none": Arm(label="not compressed", rank_to_width=0),
    "fixed": Arm(label="fixed Q (the paper's)", rank_to_width=PAPERS),
    "warm": Arm(label="warm start", rank_to_width=PAPERS, changes={"start": "warm"}),
    "resampled": Arm(label="Q resampled", rank_to_width=PAPERS, changes={"start": "resampled"}),
    "forgetful": Arm(label="errors zeroed", rank_to_width=PAPERS, changes={"error_feedback": False}),
    "low fixed": Arm(label="fixed Q (the paper's)", rank_to_width=LOW),
    "low resampled": Arm(label="Q resampled", rank_to_width=LOW, changes={"start": "resampled"}),
    "low forgetful": Arm(label="errors zeroed", rank_to_width=LOW, changes={"error_feedback": False}),
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The last loss of `arm` over that of `other`: the same within TOLERANCE, or, of one that `hurts`, larger."""

    says: str
    arm: str
    other: str
    hurts: bool = False


CLAIMS = (
    Claim(says="at the paper's ratio the loss is that without compression", arm="fixed", other="none"),
    Claim(says="a fixed Q ends where warm start does", arm="fixed", other="warm"),
    Claim(says="resampling Q hurts", arm="resampled", other="fixed", hurts=True),
    Claim(says="... at a quarter of the rank", arm="low resampled", other="low fixed", hurts=True),
    Claim(says="zeroing error buffers hurts", arm="forgetful", other="fixed", hurts=True),
    Claim(says="... at a quarter of the rank", arm="low forgetful", other="low fixed", hurts=True),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all arms share."""

    steps: int = 1_200
    warmup: int = 50
    every: int = 100
    batch_size: int = 32
    learning_rate: float = 2e-3
    n_train: int = 8_000
    n_validation: int = 512
    n_layer: int = 2
    n_head: int = 2
    head_dim: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def dim(self) -> int:
        return self.n_head * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Result:
    """One training: validation loss after so many steps."""

    arm: str
    seed: int
    steps: list[int]
    losses: list[float]
    seconds: float  # of CPU


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, to see that all works")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="updates of each training")
    parser.add_argument("--seeds", type=int, default=len(Settings.seeds), help="trainings of each arm")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table and the plot")
    args = parser.parse_args(arguments)
    settings = Settings(steps=args.steps, seeds=tuple(range(args.seeds)))
    if args.quick:
        settings = Settings(steps=2, warmup=1, every=1, batch_size=2, n_train=64, n_validation=4, seeds=(0,))
    began = time.time()
    tasks = [(name, seed, settings) for seed in settings.seeds for name in ARMS]
    trainings = in_processes(train, tasks, 1 if args.quick else args.processes)
    results = list(track(trainings, "training priors", total=len(tasks)))
    stem = args.out / f"{datetime.datetime.now(tz=datetime.timezone.utc).date()}-compression-claims"
    args.out.mkdir(parents=True, exist_ok=True)
    draw(results, settings, stem.with_suffix(".png"))
    text = report(results, settings, stem.with_suffix(".png").name, time.time() - began)
    stem.with_suffix(".md").write_text(text)
    print(f"\n{text}\n{stem}.md")


def train(task: tuple[str, int, Settings]) -> Result:
    """Trains an arm from a seed, and measures it on the validation scenes every few steps."""
    (name, seed, settings), began = task, time.process_time()
    samples, validation = make_tokens(settings.n_train, settings.n_validation)
    model = PriorConfig(
        text_vocab_size=samples.text_vocab_size,
        text_len=1 + samples.text.shape[1],
        image_vocab_size=samples.image_vocab_size,
        grid_size=samples.grid_size,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        head_dim=settings.head_dim,
    )
    sections = {"hierarchical_sharding": {"machine_size": 1}, "gradient_compression": compression(ARMS[name], settings)}
    engine = make_engine(model, ds_config(settings.batch_size, settings.learning_rate, sections), seed)
    steps, losses = [0], [evaluate(engine, validation)]
    for step in range(settings.steps):
        set_learning_rate(engine, warmup_cosine(step, settings.warmup, FINAL_RATE, settings.steps))
        backward(engine, engine(*samples.batch(settings.batch_size, seed, step))["loss"])
        engine.step()
        if (step + 1) % settings.every == 0:
            steps.append(step + 1)
            losses.append(evaluate(engine, validation))
    engine.destroy()
    return Result(arm=name, seed=seed, steps=steps, losses=losses, seconds=time.process_time() - began)


def compression(arm: Arm, settings: Settings) -> dict[str, Any]:
    """The section of the DeepSpeed JSON. In full precision: the claims are of the factors, not of their format."""
    if not arm.rank_to_width:
        return {"type": "none"}
    matrix_rank = round(arm.rank_to_width * settings.dim)
    return {"type": "powersgd", "matrix_rank": matrix_rank, "wire": "full", "errors": "full", **arm.changes}


@torch.no_grad()
def evaluate(engine: Any, validation: Tokens) -> float:
    engine.eval()
    loss = float(engine(*validation.batches(len(validation.codes))[0])["loss"])
    engine.train()
    return loss


def ratios(results: Sequence[Result], arm: str, other: str) -> list[float]:
    """Last loss of an arm over that of another, seed by seed."""
    last = {(result.arm, result.seed): result.losses[-1] for result in results}
    return [loss / last[other, seed] for (name, seed), loss in last.items() if name == arm]


def verdict(claim: Claim, values: Sequence[float]) -> str:
    """Whether all seeds say what is claimed, or how many do; what is to be the same may also be better."""
    better = sum(value < 1 for value in values)
    agree = sum(value > 1 if claim.hurts else abs(value - 1) <= TOLERANCE for value in values)
    if agree == len(values):
        return "**seen**"
    if claim.hurts and better == len(values):
        return "**the opposite**"
    counted = f"in {agree} of {len(values)} seeds"
    is_no_worse = max(values) <= 1 + TOLERANCE
    return counted if claim.hurts or not is_no_worse else f"never worse; the same {counted}"


def spread(results: Sequence[Result]) -> float:
    """How far apart, relatively, the last losses of an arm's seeds are, of the arm where they are furthest."""
    of_arms = [[result.losses[-1] for result in results if result.arm == name] for name in ARMS]
    return max(max(last) / min(last) for last in of_arms) - 1


def report(results: Sequence[Result], settings: Settings, plot: str, seconds: float) -> str:
    cpu = np.median([result.seconds for result in results])
    return "\n".join(
        [
            f"# What the paper says of compressed gradients, {datetime.datetime.now(tz=datetime.timezone.utc).date()}",
            "",
            f"Machine: {describe_machine()}. {seconds / 60:.1f} minutes; one training {cpu:.0f} s of CPU (median).",
            "",
            f"Made scenes, {settings.n_train:,} to train and {settings.n_validation} to measure: captions of six "
            f"words, 4 x 4 tokens by k-means. A prior of {settings.n_layer} layers of width {settings.dim}; "
            f"{settings.steps} updates of {settings.batch_size} scenes, AdamW from {settings.learning_rate:g} along a "
            f"cosine, fp32, ZeRO-3 and hierarchical PowerSGD through the engine of training, {len(settings.seeds)} "
            "seeds.",
            "",
            "| what the paper claims | last loss over that of | mean | by seed | so |",
            "|---|---|---|---|---|",
            *(claim_row(claim, results) for claim in CLAIMS),
            "",
            f"*Seen* when all seeds agree. The same: within {TOLERANCE:.0%}; never worse: at most that much above. "
            f"Between seeds, the last losses of one arm differ by up to {spread(results):.0%}: what is smaller than "
            "that is no more than a hint.",
            "",
            "| rank / width | arm | last validation loss, nats a token (lowest to highest) | over not compressed |",
            "|---|---|---|---|",
            *(arm_row(name, results) for name in ARMS),
            "",
            f"![Validation loss over updates, and over that without compression]({plot})",
            "",
        ]
    )


def claim_row(claim: Claim, results: Sequence[Result]) -> str:
    values = ratios(results, claim.arm, claim.other)
    by_seed = ", ".join(f"{value - 1:+.2%}" for value in values)
    compared = f"{ARMS[claim.arm].label} / {ARMS[claim.other].label}"
    return f"| {claim.says} | {compared} | {np.mean(values) - 1:+.2%} | {by_seed} | {verdict(claim, values)} |"


def arm_row(name: str, results: Sequence[Result]) -> str:
    last = [result.losses[-1] for result in results if result.arm == name]
    over = np.mean(ratios(results, name, "none")) - 1
    ratio = f"{ARMS[name].rank_to_width:.3g}" if ARMS[name].rank_to_width else ""
    return f"| {ratio} | {ARMS[name].label} | {np.mean(last):.4f} ({min(last):.4f} to {max(last):.4f}) | {over:+.2%} |"


def draw(results: Sequence[Result], settings: Settings, path: Path) -> None:
    """Loss over updates, then over that without compression; means over seeds, bands from lowest to highest."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    papers = [name for name, arm in ARMS.items() if arm.rank_to_width == PAPERS]
    low = [name for name, arm in ARMS.items() if arm.rank_to_width == LOW]
    with mpl.rc_context(
        {"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    ):
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        loss, at_papers, at_low = figure.subplots(1, 3)
        draw_panel(loss, ["none", *papers], results, relative=False)
        draw_panel(at_papers, papers, results, relative=True)
        draw_panel(at_low, low, results, relative=True)
        loss.set_title(f"Rank / width {PAPERS:.3g}: validation loss", color=INK)
        at_papers.set_title(f"Rank / width {PAPERS:.3g}: over not compressed", color=INK)
        at_low.set_title(f"Rank / width {LOW:.3g}: over not compressed", color=INK)
        at_papers.axhspan(-100 * TOLERANCE, 100 * TOLERANCE, color=GRID, zorder=0)
        figure.savefig(path, dpi=130)


def draw_panel(axes: Any, names: Sequence[str], results: Sequence[Result], *, relative: bool) -> None:
    plain = {result.seed: np.array(result.losses) for result in results if result.arm == "none"}
    for name in names:
        own = [result for result in results if result.arm == name]
        values = np.array([result.losses for result in own])
        if relative:
            values = 100 * (values / np.array([plain[result.seed] for result in own]) - 1)
        steps, colour = own[0].steps[1:], COLOURS[ARMS[name].label]
        axes.plot(steps, values.mean(0)[1:], color=colour, linewidth=1.8, label=ARMS[name].label)
        axes.fill_between(steps, values.min(0)[1:], values.max(0)[1:], color=colour, alpha=0.15, linewidth=0)
    axes.set_ylabel("%" if relative else "nats a token", color=SOFT)
    axes.set_xlabel("update", color=SOFT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, length=0)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    if not relative:  # the first panel has all arms
        axes.legend(framealpha=1, edgecolor="none", labelcolor=INK, fontsize=8.5)


INK, SOFT, RULE, GRID = "#1f2430", "#5b6270", "#b9bec8", "#e6e8ec"
COLOURS = {
    "not compressed": "#1f2430",
    "fixed Q (the paper's)": "#2563b8",
    "warm start": "#2a9d6f",
    "Q resampled": "#e07b1a",
    "errors zeroed": "#b8325e",
}

if __name__ == "__main__":
    main()
