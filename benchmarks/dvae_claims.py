"""What the paper says of the dVAE's training, put to the test in minutes (section 2.1, Appendix A.2).

    python benchmarks/dvae_claims.py [--quick]

The claims: a KL weight of 6.6 uses the codebook better than 1 and reconstructs better; the temperature must fall along
a cosine, as linear annealing usually diverged; max pooling reaches a better evidence lower bound (ELB) than average
pooling; a last temperature of 1/16 closes the gap between the relaxed and the true ELB. Each arm trains the published
procedure on made scenes and differs from the paper's arm in the one thing claimed; a seed gives all arms the same first
weights, batches and noise. Writes benchmarks/results/<date>-dvae-claims.md and .png. About 9 minutes on 2 cores.
"""

import argparse
import datetime
import functools
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from parts.measuring import describe_machine
from rich.progress import track
from torch import Tensor

from dalle_ds.config import DVAEConfig, DVAEScheduleConfig
from dalle_ds.data.scenes import draw_scene, held_out_combinations, render
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.likelihood import (
    UINT8_MAX,
    gumbel_softmax,
    kl_to_uniform,
    logit_laplace_log_density,
    map_pixels,
)
from dalle_ds.training.schedules import cosine

RESULTS = Path(__file__).parent / "results"
PAPER = DVAEScheduleConfig()  # its defaults are the paper's lengths and ends
# Made scenes are flat to the last bit, and a flat colour has no bound on its density: cameras are not so.
CAMERA_NOISE = 4.0  # of 255, standard deviation
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 1e-4
EVALUATION_SEED = 1_000_000
# Divergence: what the training loss (its mean over WINDOW steps) has lost, in nats a dimension, and not won back.
WINDOW, LOST = 50, 0.25
CELL_DIMENSIONS = 8 * 8 * 3


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train; the defaults are the paper's."""

    label: str
    kl_weight: float = PAPER.kl_weight
    anneal: str = "cosine"
    pool: str = "max"
    temperature_end: float = PAPER.temperature_end


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all arms share. `stretch` multiplies each of the paper's lengths: KL weight, temperature, learning rate."""

    steps: int = 1_200
    stretch: float = 1 / 400
    learning_rate: float = 1e-3
    batch_size: int = 32
    n_train: int = 8_000
    n_validation: int = 512
    every: int = 50
    seeds: tuple[int, ...] = (0, 1, 2)
    model: DVAEConfig = field(
        default_factory=lambda: DVAEConfig(image_size=32, n_hid=8, n_blk_per_group=1, n_init=64, vocab_size=128)
    )


@dataclass(frozen=True, kw_only=True)
class Result:
    """One training: validation figures over steps, and whether it diverged."""

    arm: str
    seed: int
    curve: dict[str, list[float]]
    diverged: bool
    largest_rise: float
    seconds: float  # of CPU

    def last(self, name: str) -> float:
        """The mean over the last quarter of the evaluations: one alone is noisy."""
        values = self.curve[name]
        return float(np.mean(values[-max(1, len(values) // 4) :]))


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
        settings = Settings(steps=2, every=1, stretch=1 / 100_000, batch_size=4, n_train=16, n_validation=8, seeds=(0,))
    began = time.time()
    results = train_all(settings, 1 if args.quick else args.processes)
    stem = args.out / f"{datetime.datetime.now(tz=datetime.timezone.utc).date()}-dvae-claims"
    args.out.mkdir(parents=True, exist_ok=True)
    draw(results, settings, stem.with_suffix(".png"))
    text = report(results, settings, stem.with_suffix(".png").name, time.time() - began)
    stem.with_suffix(".md").write_text(text)
    print(f"\n{text}\n{stem}.md")


def train_all(settings: Settings, processes: int) -> list[Result]:
    """Every arm with every seed, arms interleaved, in processes of one thread."""
    tasks = [(name, seed, settings) for seed in settings.seeds for name in ARMS]
    if processes == 1:
        torch.set_num_threads(1)
        return [train(*task) for task in track(tasks, "training dVAEs")]
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        return list(track(pool.imap(_train, tasks), "training dVAEs", total=len(tasks)))


def _train(task: tuple[str, int, Settings]) -> Result:
    return train(*task)


def train(name: str, seed: int, settings: Settings) -> Result:
    """Trains arm `name` from `seed` and measures it on the validation pictures every few steps."""
    arm, began = ARMS[name], time.process_time()
    pictures = scenes(settings.n_train, 0, settings.model.image_size)
    validation = scenes(settings.n_validation, 1, settings.model.image_size)
    torch.manual_seed(seed)
    dvae = DVAE(replace(settings.model, pool=arm.pool))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        dvae.parameters(), lr=settings.learning_rate, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
    )
    losses: list[float] = []
    norms: list[float] = [0.0]
    curve: dict[str, list[float]] = {}
    for step in range(settings.steps + 1):
        temperature, kl_weight, lr_multiplier = schedules(arm, step, settings.stretch)
        if step % settings.every == 0 or step == settings.steps:
            figures = {"step": step, "temperature": temperature, **measure(dvae, validation, temperature)}
            for key, value in {**figures, "gradient": max(norms)}.items():
                curve.setdefault(key, []).append(value)
            norms = [0.0]
        optimizer.param_groups[0]["lr"] = settings.learning_rate * lr_multiplier
        batch = pictures[torch.randint(len(pictures), (settings.batch_size,), generator=generator)]
        optimizer.zero_grad()
        loss = dvae(batch, temperature, kl_weight, generator)["loss"]
        loss.backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in dvae.parameters() if p.grad is not None)))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.step()
    rise, lost = rises(losses)
    return Result(
        arm=name,
        seed=seed,
        curve=curve,
        diverged=not lost <= LOST,
        largest_rise=rise,
        seconds=time.process_time() - began,
    )


def schedules(arm: Arm, step: int, stretch: float) -> tuple[float, float, float]:
    """Temperature, KL weight and learning-rate multiplier at `step`: the paper's curves, `stretch` times as long."""
    temperature = ANNEALS[arm.anneal](
        step, PAPER.temperature_start, arm.temperature_end, round(PAPER.temperature_steps * stretch)
    )
    kl_weight = cosine(step, PAPER.kl_weight_start, arm.kl_weight, round(PAPER.kl_steps * stretch))
    return temperature, kl_weight, cosine(step, 1.0, PAPER.lr_final_multiplier, round(PAPER.lr_steps * stretch))


def linear(step: int, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at `steps` along a straight line, then constant."""
    return end if step >= steps else start + (end - start) * step / steps


def rises(losses: Sequence[float]) -> tuple[float, float]:
    """The largest rise of the loss above its lowest so far, and the rise that is left at the end; means over WINDOW."""
    if not np.all(np.isfinite(losses)):
        return math.inf, math.inf
    width = min(WINDOW, len(losses))
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    above = means - np.minimum.accumulate(means)
    return float(above.max()), float(above[-1])


@functools.cache
def scenes(n: int, split: int, image_size: int) -> Tensor:
    """Made pictures with camera noise, uint8 [n, 3, S, S], one or two objects each; splits share no picture."""
    pictures = []
    for i in range(n):
        rng = np.random.default_rng([split, i])
        scene = draw_scene(rng, int(rng.integers(1, 3)), held_out_combinations(0), None)
        clean = np.asarray(render(scene, image_size), dtype=np.float64)
        pictures.append(np.clip(np.rint(clean + rng.normal(0, CAMERA_NOISE, clean.shape)), 0, UINT8_MAX))
    stack = torch.from_numpy(np.stack(pictures).astype(np.uint8))
    return stack.permute(0, 3, 1, 2)  # channels last in memory


@torch.no_grad()
def measure(dvae: DVAE, images: Tensor, temperature: float) -> dict[str, float]:
    """Validation figures. ELBs are at KL weight 1, in nats a dimension (a colour value), as are the others but PSNR.

    The relaxed and the true bound share their noise: the likeliest token of a relaxed sample is a sample of q.
    """
    mapped = map_pixels(images)
    logits = dvae.logits(mapped)  # [B, K, g, g]
    kl = float(kl_to_uniform(logits).flatten(1).sum(1).mean()) / images[0].numel()
    relaxed = gumbel_softmax(logits, temperature, torch.Generator().manual_seed(EVALUATION_SEED))
    sampled = F.one_hot(relaxed.argmax(1), logits.shape[1]).permute(0, 3, 1, 2).float()
    relaxed_reconstruction = reconstruction(dvae, mapped, relaxed)
    true_reconstruction = reconstruction(dvae, mapped, sampled)
    codes = logits.argmax(1)
    squares = (dvae.decode(codes).float() - images.float()).square().flatten(1).mean(1)
    probability = torch.bincount(codes.flatten(), minlength=logits.shape[1]) / codes.numel()
    return {
        "reconstruction": true_reconstruction,
        "kl_per_cell": kl * CELL_DIMENSIONS,
        "relaxed": -relaxed_reconstruction - kl,
        "true": -true_reconstruction - kl,
        "gap": true_reconstruction - relaxed_reconstruction,
        "psnr": float((10 * torch.log10(UINT8_MAX**2 / squares)).mean()),
        "use": float((probability > 0).float().mean()),
        "perplexity": float((-torch.special.xlogy(probability, probability).sum()).exp()),
    }


def reconstruction(dvae: DVAE, mapped: Tensor, weights: Tensor) -> float:
    """-ln f of mapped pictures given token weights [B, K, g, g], the mean over dimensions."""
    mu, log_b = dvae.decoder(weights).float().chunk(2, dim=1)
    return float(-logit_laplace_log_density(mapped, mu, log_b).mean())


def report(results: Sequence[Result], settings: Settings, plot: str, seconds: float) -> str:
    """The whole page: machine, setting, claims against what was seen, figures of each arm."""
    return "\n".join(
        [
            f"# What the paper says of the dVAE's training, {datetime.datetime.now(tz=datetime.timezone.utc).date()}",
            "",
            f"Machine: {describe_machine()}. "
            f"{seconds / 60:.1f} minutes; one training "
            f"{np.median([result.seconds for result in results]):.0f} s of CPU (median).",
            "",
            *setting_lines(settings),
            "",
            "| what the paper claims | what we see | so |",
            "|---|---|---|",
            *(claim_row(claim, results) for claim in CLAIMS),
            "",
            "Compared seed by seed: *seen*, or *the opposite*, when all seeds agree.",
            "",
            "| arm | " + " | ".join(heading for heading, _, _ in COLUMNS) + " | largest rise of the loss | diverged |",
            "|---" * (len(COLUMNS) + 3) + "|",
            *(arm_row(name, results) for name in ARMS),
            "",
            "Mean over seeds (lowest to highest), each the mean over the last quarter of the training's evaluations.",
            "",
            f"![Curves of each claim over training steps]({plot})",
            "",
        ]
    )


def setting_lines(settings: Settings) -> list[str]:
    model, stretch = settings.model, settings.stretch
    lengths = [round(n * stretch) for n in (PAPER.kl_steps, PAPER.temperature_steps, PAPER.lr_steps)]
    return [
        f"Made scenes of {model.image_size} x {model.image_size} with camera noise of {CAMERA_NOISE:g}/255, "
        f"{settings.n_train:,} to train and {settings.n_validation} to measure. n_hid {model.n_hid}, "
        f"{model.n_blk_per_group} resblock a group, {model.vocab_size} tokens, "
        f"{model.grid_size} x {model.grid_size} cells. {settings.steps:,} updates of {settings.batch_size} pictures, "
        f"AdamW from {settings.learning_rate:g}, fp32, {len(settings.seeds)} seeds. The paper's schedules, each "
        f"stretched by 1/{1 / stretch:g}: KL weight over {lengths[0]} updates, temperature over {lengths[1]}, learning "
        f"rate over {lengths[2]}; the training stops where the paper had made {settings.steps / stretch:,.0f} of its "
        "3,000,000. No warm start, no averaged parameters.",
        "",
        "ELB: evidence lower bound at KL weight 1; true: tokens sampled from q; relaxed: at the temperature of the "
        "step. Nats a dimension (a colour value). Token use and PSNR are those of the likeliest tokens. Diverged: the "
        f"loss is not finite, or its mean over the last {WINDOW} updates is more than {LOST} nats above its lowest.",
    ]


def arm_row(name: str, results: Sequence[Result]) -> str:
    own = [result for result in results if result.arm == name]
    cells = [spread([result.last(key) for result in own], form) for _, key, form in COLUMNS]
    diverged = f"{sum(result.diverged for result in own)} of {len(own)}"
    rise = spread([result.largest_rise for result in own], ".2f")
    return f"| {ARMS[name].label} | " + " | ".join([*cells, rise, diverged]) + " |"


def spread(values: Sequence[float], form: str) -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something the paper says: `figure` of its arm is, seed by seed, larger (or smaller) than that of `other`."""

    says: str
    other: str
    figure: Callable[[Result], float]
    form: str
    name: str
    larger: bool


def claim_row(claim: Claim, results: Sequence[Result]) -> str:
    ours = [claim.figure(result) for result in results if result.arm == "paper"]
    others = [claim.figure(result) for result in results if result.arm == claim.other]
    seen = (
        f"{claim.name}: {spread(ours, claim.form)}; {ARMS[claim.other].label.split(': ')[-1]} "
        f"{spread(others, claim.form)}"
    )
    return f"| {claim.says} | {seen} | {verdict(ours, others, larger=claim.larger)} |"


def verdict(ours: Sequence[float], others: Sequence[float], *, larger: bool) -> str:
    """Whether the paper's arm is on the side claimed: with all seeds, with none, or with how many."""
    pairs = list(zip(ours, others, strict=True))
    agree = sum(a > b if larger else a < b for a, b in pairs)
    equal = sum(a == b for a, b in pairs)
    if equal == len(pairs):
        return "no difference"
    if agree == len(pairs):
        return "**seen**"
    return f"in {agree} of {len(pairs)} seeds" if agree + equal else "**the opposite**"


def draw(results: Sequence[Result], settings: Settings, path: Path) -> None:
    """One panel a question: means over seeds as lines, lowest to highest as bands; the paper's arm is always blue."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    ):
        figure = Figure(figsize=(12, 6.6), layout="constrained")
        grid = figure.subplots(2, 3).flatten()
        for axes, panel in zip(grid, PANELS, strict=True):
            draw_panel(axes, panel, results, settings)
        figure.suptitle(
            f"The dVAE's training, claim by claim: validation, mean and range over {len(settings.seeds)} seeds",
            x=0.01,
            ha="left",
        )
        figure.savefig(path, dpi=130)


def draw_panel(axes: Any, panel: "Panel", results: Sequence[Result], settings: Settings) -> None:
    for name, colour in (("paper", BLUE), (panel.other, ORANGE)):
        curves = [result.curve for result in results if result.arm == name]
        n = min(len(curve["step"]) for curve in curves)
        steps = curves[0]["step"][panel.skip : n]
        values = np.array([curve[panel.key][panel.skip : n] for curve in curves])
        label = panel.label if name == "paper" else panel.other_label
        axes.plot(steps, values.mean(0), color=colour, linewidth=1.8, label=label)
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
    axes.set_title(panel.title, color=INK)
    axes.set_ylabel(panel.axis, color=SOFT)
    axes.set_xlabel("update", color=SOFT)
    if panel.log:
        axes.set_yscale("log")
    annealed = PAPER.temperature_steps * settings.stretch
    axes.axvline(annealed, color=RULE, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate("  annealed", (annealed, 0.015), xycoords=("data", "axes fraction"), color=SOFT, fontsize=8)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.015, y=0.1)
    axes.tick_params(colors=SOFT, length=0, which="both")
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.legend(framealpha=1, edgecolor="none", labelcolor=INK, fontsize=8.5)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A figure over steps: the paper's arm against one other. `skip` evaluations at the start are left out."""

    title: str
    key: str
    axis: str
    label: str
    other: str
    other_label: str
    log: bool = False
    skip: int = 1


BLUE, ORANGE = "#2563b8", "#e07b1a"
INK, SOFT, RULE, GRID = "#1f2430", "#5b6270", "#b9bec8", "#e6e8ec"

ANNEALS: dict[str, Callable[[int, float, float, int], float]] = {"cosine": cosine, "linear": linear}

ARMS = {
    "paper": Arm(label="the paper's: KL weight 6.6, cosine to 1/16, max pooling"),
    "kl_1": Arm(label="but: KL weight 1", kl_weight=1.0),
    "linear": Arm(label="but: linear annealing", anneal="linear"),
    "average": Arm(label="but: average pooling", pool="average"),
    "hot": Arm(label="but: temperature kept at 1", temperature_end=1.0),
}

CLAIMS = (
    Claim(
        says="KL weight 6.6 uses the codebook better than 1",
        other="kl_1",
        figure=lambda result: result.last("perplexity"),
        form=".1f",
        name="perplexity of the tokens",
        larger=True,
    ),
    Claim(
        says="... and its final reconstruction error is lower",
        other="kl_1",
        figure=lambda result: result.last("reconstruction"),
        form=".3f",
        name="-ln f",
        larger=False,
    ),
    Claim(
        says="linear annealing of the temperature usually diverged",
        other="linear",
        figure=lambda result: float(result.diverged),
        form=".0%",
        name="diverged",
        larger=False,
    ),
    Claim(
        says="max pooling reaches a better ELB than average pooling",
        other="average",
        figure=lambda result: result.last("true"),
        form=".3f",
        name="true ELB",
        larger=True,
    ),
    Claim(
        says="annealing to 1/16 closes the gap between relaxed and true ELB",
        other="hot",
        figure=lambda result: abs(result.last("gap")),
        form=".3f",
        name="size of the gap",
        larger=False,
    ),
    Claim(
        says="(not claimed, but hoped for) annealing also raises the true ELB itself",
        other="hot",
        figure=lambda result: result.last("true"),
        form=".3f",
        name="true ELB",
        larger=True,
    ),
)

COLUMNS = (
    ("-ln f", "reconstruction", ".3f"),
    ("relaxed ELB", "relaxed", ".3f"),
    ("true ELB", "true", ".3f"),
    ("gap", "gap", ".3f"),
    ("KL a cell", "kl_per_cell", ".2f"),
    ("PSNR, dB", "psnr", ".2f"),
    ("tokens used", "use", ".0%"),
    ("perplexity", "perplexity", ".1f"),
)

PANELS = (
    Panel(
        title="KL weight: use of the codebook",
        key="perplexity",
        axis="perplexity of the tokens",
        label="6.6",
        other="kl_1",
        other_label="1",
    ),
    Panel(
        title="Annealing: does linear diverge?",
        key="true",
        axis="true ELB, nats a dimension",
        label="cosine",
        other="linear",
        other_label="linear",
    ),
    Panel(
        title="Pooling: evidence lower bound",
        key="true",
        axis="true ELB, nats a dimension",
        label="max",
        other="average",
        other_label="average",
    ),
    Panel(
        title="KL weight: reconstruction error",
        key="reconstruction",
        axis="−ln f, nats a dimension",
        label="6.6",
        other="kl_1",
        other_label="1",
    ),
    Panel(
        title="Annealing: spikes of the gradient",
        key="gradient",
        axis="largest norm since the last point",
        label="cosine",
        other="linear",
        other_label="linear",
        log=True,
    ),
    Panel(
        title="Last temperature: relaxed minus true ELB",
        key="gap",
        axis="gap, nats a dimension",
        label="annealed to 1/16",
        other="hot",
        other_label="kept at 1",
    ),
)


if __name__ == "__main__":
    main()
