"""The claim: where gradients of resblocks lie far apart, fp16 with one loss scale fails and a scale for each trains.

    python benchmarks/gradient_scaling.py [--steps 400] [--seeds 3] [--processes 2] [--quick]

A deep narrow prior (24 resblocks) learns to write its caption into its picture, which takes attention, through the
real engine at ZeRO-3 with 16-bit matrices. In the steep setting gradients of one resblock are large, as two things make
them: outputs of resblocks have constant gains, 2^8 in one and 2^-12 in the others, their last matrices being as many
times smaller or larger; and one hidden channel of that resblock holds a constant of 2^12, a massive activation (Sun et
al. 2024). Learning rates follow the matrices, so that in exact arithmetic the gains change nothing. The loss is 2^-12
of itself there, as in a batch 4,096 times as large by whose size it is divided; Adam does not see that. So both kinds
of scale begin at the upper end of the paper's range and stay inside it. Writes
benchmarks/results/<date>-gradient-scaling.md and .png. About 20 minutes on two cores.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts.engines import ds_config, in_processes, make_engine
from parts.measuring import describe_machine, results_path
from rich.progress import track
from torch import Tensor, nn

from dalle_ds.config import PriorConfig
from dalle_ds.models.gradient_scaling import resblock_index
from dalle_ds.models.prior import Prior
from dalle_ds.training.engine import Engine, backward, set_learning_rate
from dalle_ds.training.schedules import warmup_cosine
from dalle_ds.training.whole_weights import whole_weights

LEARNING_RATE, WARMUP, FINAL = 2e-3, 20, 0.1
TAIL = 20  # updates, whose mean loss is the last loss
# Of the way from guessing to float32's loss: at most, and at least.
FAILS, TRAINS = 0.1, 0.9
FIRST_SCALE = 24  # as a power of two: the highest of the paper's
# The paper's bounds and growth. But a benchmark is short: scales are halved, as DeepSpeed's, and at every overflow,
# where the paper's fall by a square root of that, and once in 125 updates.
SCALES = {"initial_scale": 2.0**FIRST_SCALE, "shrink": 2.0, "patience": 0}
# DeepSpeed's own settings, but for the first scale, and the window after which it is doubled: 1,000 updates are more
# than there are.
GLOBAL = {"enabled": True, "initial_scale_power": FIRST_SCALE, "loss_scale_window": 50}
LOUD = 1  # the resblock with large gradients: the first MLP
# Adam and clipping see gradients of all sizes, so neither is to have a size of its own; nor are buffers to end at 16,
# as those of 1-6-9 do.
NO_SIZE = {
    "gradient_clipping": 0.0,
    "data_types": {"grad_accum_dtype": "fp32"},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "eps": 1e-20, "weight_decay": 0.0}},
}
ARMS: dict[str, Mapping[str, Any]] = {
    "float32": {},
    "fp16, a scale for each resblock": {
        "fp16": {"enabled": True, "loss_scale": 1},
        "resblock_gradient_scaling": SCALES,
    },
    "fp16, one dynamic scale": {"fp16": GLOBAL, "mixed_precision": {}},
    "fp16, no scale": {"fp16": {"enabled": True, "loss_scale": 1}, "mixed_precision": {}},
    "bf16, no scale": {"bf16": {"enabled": True}, "mixed_precision": {}},
}
REFERENCE, EACH, ONE, NONE, BF16 = ARMS


@dataclass(frozen=True)
class Steepness:
    """Gains of branch outputs, the constant in a hidden channel of the loud resblock, and the factor of the loss.

    All as powers of two.
    """

    loud: int = 0
    quiet: int = 0
    constant: int | None = None
    loss: int = 0

    def gain(self, resblock: int) -> float:
        return 2.0 ** (self.loud if resblock == LOUD else self.quiet)


SETTINGS = {
    "plain": Steepness(),
    "gains alone": Steepness(8, -12),
    "steep: gains and constant": Steepness(8, -12, 12, -12),
}
PLAIN, GAINS, STEEP = SETTINGS
TASKS = (
    *((STEEP, arm) for arm in ARMS),
    (GAINS, ONE),
    (PLAIN, REFERENCE),
    (PLAIN, EACH),
    (PLAIN, ONE),
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is trained, and how long."""

    steps: int = 400
    batch_size: int = 64
    every: int = 20  # updates between counts of entries that were flushed to zero
    seed: int = 0
    model: PriorConfig = field(
        default_factory=lambda: PriorConfig(
            text_vocab_size=16, text_len=8, image_vocab_size=16, grid_size=3, n_layer=12, n_head=2, head_dim=16
        )
    )

    @property
    def n_resblocks(self) -> int:
        return 2 * self.model.n_layer


@dataclass(frozen=True, kw_only=True)
class Result:
    """One training. `scales` [steps][resblocks or 1], `flushed` {step: [resblocks]}: fractions of matrix entries."""

    setting: str
    arm: str
    seed: int = 0
    losses: list[float]
    scales: list[list[float]] = field(default_factory=list)
    flushed: dict[int, list[float]] = field(default_factory=dict)
    skipped: int
    ended: bool
    """by DeepSpeed, whose scale cannot fall below 1"""
    seconds: float  # of CPU

    @property
    def last(self) -> float:
        return float(np.mean(self.losses[-TAIL:]))


class Gain(nn.Module):
    """The constant at the end of a branch, in float32."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * self.gain


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Size.steps)
    parser.add_argument("--seeds", type=int, default=3, help="of the steep setting; the milder ones have one")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, of one thread each")
    parser.add_argument("--quick", action="store_true", help="two steps of a small model, to see that all works")
    parser.add_argument("--out", type=Path, default=results_path("").parent, help="folder of the table and the plot")
    args = parser.parse_args(arguments)
    size, seeds = Size(steps=args.steps), args.seeds
    if args.quick:
        small = PriorConfig(
            text_vocab_size=4, text_len=4, image_vocab_size=4, grid_size=2, n_layer=1, n_head=1, head_dim=8
        )
        size, seeds = Size(steps=2, batch_size=2, every=1, model=small), 1
    began = time.time()
    tasks = [
        (*task, replace(size, seed=seed)) for seed in range(seeds) for task in TASKS if not seed or task[0] == STEEP
    ]
    trained = in_processes(train, tasks, 1 if args.quick else args.processes)
    results = list(track(trained, "training priors", total=len(tasks)))
    write(results, size, args.out, time.time() - began)


def write(results: Sequence[Result], size: Size, out: Path, seconds: float) -> None:
    stem = out / results_path("gradient-scaling").stem
    draw(results, size, stem.with_suffix(".png"))
    text = report(results, size, stem.with_suffix(".png").name, seconds)
    stem.with_suffix(".md").write_text(text)
    print(f"\n{text}\n{stem}.md")


def train(task: tuple[str, str, Size]) -> Result:
    """Trains an arm in a setting; the loss is that of the picture's tokens."""
    setting, arm, size = task
    steepness, began = SETTINGS[setting], time.process_time()
    config = ds_config(size.batch_size, LEARNING_RATE, {**NO_SIZE, **ARMS[arm]})
    engine = make_engine(
        size.model,
        config,
        size.seed,
        lr_multiplier=lambda name: factor(name, steepness) * (damping(name, steepness)),
        finish=lambda prior: steepen(prior, steepness),
    )
    reference = Prior(size.model)
    add_gains(reference, steepness)
    losses: list[float] = []
    scales: list[list[float]] = []
    flushed: dict[int, list[float]] = {}
    ended = False
    while len(losses) < size.steps and not ended:
        step = len(losses)
        set_learning_rate(engine, warmup_cosine(step, WARMUP, FINAL, size.steps))
        batch = draw_batch(size, step)
        counts = count_zeros(engine, reference, batch, step, size, steepness)
        output = engine(*batch)
        losses.append(output["image_loss"].item())
        scales.append(scales_of(engine))
        backward(engine, output["loss"] * 2.0**steepness.loss)
        try:
            engine.step()
        except Exception as error:
            # DeepSpeed's only word for it.
            if "minimum" not in str(error):
                raise
            ended = True
        if counts is not None:
            flushed[step] = (counts[:, 0] / counts[:, 1].clamp(min=1)).tolist()
            engine.extras.path.unscaling.watch = None
    result = Result(
        setting=setting,
        arm=arm,
        seed=size.seed,
        losses=losses,
        scales=scales,
        flushed=flushed,
        skipped=engine.skipped_steps,
        ended=ended,
        seconds=time.process_time() - began,
    )
    engine.destroy()
    return result


def draw_batch(size: Size, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Captions of random tokens, and pictures that repeat them row by row."""
    model = size.model
    n_token = model.text_len - 1
    generator = torch.Generator().manual_seed(size.seed * 1_000_000 + step)
    text = torch.randint(model.text_vocab_size, (size.batch_size, n_token), generator=generator)
    codes = text[:, torch.arange(model.image_len) % n_token]
    return text, torch.full((size.batch_size,), n_token), codes


def steepen(prior: Prior, steepness: Steepness) -> None:
    """Adds the gains and makes up for them in the last matrices; plants the constant, which nothing reads at first."""
    import deepspeed

    add_gains(prior, steepness)
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(prior.parameters()), modifier_rank=0):
        for name, parameter in prior.named_parameters():
            parameter.mul_(factor(name, steepness))
        if steepness.constant is not None:
            mlp = prior.layers[LOUD // 2].mlp
            mlp.up.bias[0] = 2.0**steepness.constant
            mlp.down.weight[0] = 0.0  # stored as [n_in, n_out]


def add_gains(prior: Prior, steepness: Steepness) -> None:
    for i, layer in enumerate(prior.layers):
        layer.attention_end = Gain(steepness.gain(2 * i))
        layer.mlp_end = Gain(steepness.gain(2 * i + 1))


def factor(name: str, steepness: Steepness) -> float:
    """What a parameter and its learning rate are multiplied by to make up for a gain."""
    resblock = resblock_index(name)
    is_last = ".attention.project." in name or ".mlp.down." in name
    return 1 / steepness.gain(resblock) if is_last and resblock is not None else 1.0


def damping(name: str, steepness: Steepness) -> float:
    """A matrix that reads the constant learns as much more slowly."""
    reads = steepness.constant is not None and name == f"layers.{LOUD // 2}.mlp.down.weight"
    return 2.0**-steepness.constant if reads else 1.0


def scales_of(engine: Engine) -> list[float]:
    scaling = engine.extras.scaling
    if scaling.values is not None:
        return [float(scale) for scale in scaling.values]
    return [float(engine.optimizer.loss_scale)] if engine.fp16_enabled() else [1.0]


def count_zeros(
    engine: Engine, reference: Prior, batch: tuple[Tensor, ...], step: int, size: Size, steepness: Steepness
) -> Tensor | None:
    """Has entries counted in the backward pass to come: [resblocks, (flushed, not zero in float32)] of matrices.

    None where it is not the step for it, or where nothing has 16 bits.
    """
    if step % size.every or engine.extras.path is None:
        return None
    reference.load_state_dict(dict(whole_weights(engine)))
    reference.zero_grad()
    (reference(*batch)["loss"] * 2.0**steepness.loss).backward()
    exact = {name: parameter.grad for name, parameter in reference.named_parameters()}
    counts = torch.zeros(size.n_resblocks, 2, dtype=torch.float64)

    def watch(name: str, resblock: int | None, gradient: Tensor, scale: Tensor | float) -> None:
        truth = exact[name]
        if resblock is None or truth is None or truth.dim() < 2:
            return
        is_there = truth.flatten() != 0
        counts[resblock] += torch.stack([((gradient.flatten() == 0) & is_there).sum(), is_there.sum()])

    engine.extras.path.unscaling.watch = watch
    return counts


def report(results: Sequence[Result], size: Size, plot: str, seconds: float) -> str:
    """The whole page: machine, setting, figures of each training, and what was needed."""
    steep, model = SETTINGS[STEEP], size.model
    cpu = np.median([result.seconds for result in results])
    n_seeds = 1 + max(result.seed for result in results)
    return "\n".join(
        [
            f"# One gradient scale or one a resblock, {results_path('').name[:10]}",
            "",
            f"Machine: {describe_machine()}. {seconds / 60:.1f} minutes; one training {cpu:.0f} s of CPU (median).",
            "",
            f"{size.n_resblocks} resblocks of width {model.dim}; captions of {model.text_len - 1} random tokens of "
            f"{model.text_vocab_size}, pictures of {model.image_len} tokens that repeat them: guessing costs "
            f"{math.log(model.image_vocab_size):.3f} nats a token. {size.steps} updates of {size.batch_size} in every "
            f"arm, AdamW at {LEARNING_RATE:g} after {WARMUP} updates of warm-up, to {FINAL:.0%} of it along a cosine, "
            "eps 1e-20, no weight decay, no clipping. ZeRO-3 on one process, matrices of resblocks in 16 bits with "
            "float32 copies and all else in float32, gradients added up in float32.",
            "",
            f"Steep: outputs of resblocks have a gain of 2^{steep.quiet}, that of resblock {LOUD} one of "
            f"2^{steep.loud}; its hidden channel 0 holds 2^{steep.constant}; the loss is 2^{steep.loss} of itself, as "
            "in a batch so much larger by whose size it is divided. Adam sees none of it. Both kinds of scale begin at "
            f"2^{FIRST_SCALE} and are halved when something overflows. One dynamic scale is DeepSpeed's, doubled after "
            f"{GLOBAL['loss_scale_window']} updates. Those of resblocks have the paper's bounds, 2^7 and 2^24, and its "
            "growth of 2^0.001; the paper's fall by the root of 2 and once in 125 updates, which takes thousands.",
            "",
            "| setting | arm | loss at the end, nats a token | over float32's | flushed to zero: mean of resblocks | "
            "worst resblock | skipped updates | scales at the end |",
            "|---|---|---|---|---|---|---|---|",
            *(row(results, *task) for task in TASKS),
            "",
            f"Loss: mean over the last {TAIL} updates; of the steep setting mean of {n_seeds} seeds (lowest to "
            "highest). Flushed: entries of gradients of a resblock's matrices that are zero after the backward pass "
            "and are not in float32 at the same weights, mean over the second half of training.",
            "",
            *conclusions(results, size),
            "",
            f"![Scales, entries flushed to zero, and losses]({plot})",
            "",
        ]
    )


def of(results: Sequence[Result], setting: str, arm: str) -> list[Result]:
    """Those of the arm, by seed."""
    return [result for result in results if (result.setting, result.arm) == (setting, arm)]


def row(results: Sequence[Result], setting: str, arm: str) -> str:
    found = of(results, setting, arm)
    # In exact arithmetic gains change nothing, so that plain float32 is what to compare with.
    references = of(results, STEEP if setting == STEEP else PLAIN, REFERENCE)
    excesses = [result.last - reference.last for result, reference in zip(found, references, strict=False)]
    flushed = [late_flushes(result) for result in found if result.flushed]
    logs = [[math.log2(scale) for scale in result.scales[-1]] for result in found]
    low, high = min(map(min, logs)), max(map(max, logs))
    cells = [
        span([result.last for result in found]),
        f"{np.mean(excesses):+.3f}",
        f"{np.mean(flushed):.1%}" if flushed else "",
        f"{np.mean([max(values) for values in flushed]):.1%}" if flushed else "",
        ", ".join(f"{result.skipped}{' (ended by DeepSpeed)' if result.ended else ''}" for result in found),
        "" if "fp16" not in arm else f"2^{low:.1f}" if low == high else f"2^{low:.1f} to 2^{high:.1f}",
    ]
    return f"| {setting} | {arm} | " + " | ".join(cells) + " |"


def span(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def late_flushes(result: Result) -> list[float]:
    """For each resblock, the mean over the second half of training."""
    steps = sorted(result.flushed)
    late = [result.flushed[step] for step in steps[len(steps) // 2 :]]
    return [float(value) for value in np.mean(late, axis=0)] if late else []


def conclusions(results: Sequence[Result], size: Size) -> list[str]:
    last = {task: float(np.mean([result.last for result in of(results, *task)])) for task in TASKS}
    one, each = of(results, STEEP, ONE), of(results, STEEP, EACH)
    holds = [
        way(a.last, reference.last, size) <= FAILS and way(b.last, reference.last, size) >= TRAINS
        for a, b, reference in zip(one, each, of(results, STEEP, REFERENCE), strict=True)
    ]
    others = [value for result in one for k, value in enumerate(late_flushes(result)) if k != LOUD]
    loud = [result.scales[-1][LOUD] for result in each]
    is_lowest = all(min(result.scales[-1]) == scale for result, scale in zip(each, loud, strict=True))
    milder = {task: way(last[task], last[PLAIN, REFERENCE], size) >= TRAINS for task in ((PLAIN, ONE), (GAINS, ONE))}
    return [
        f"- In the steep setting one scale ends at {last[STEEP, ONE]:.3f} nats after {len(one[0].losses)} updates, one "
        f"for each resblock at {last[STEEP, EACH]:.3f}, float32 at {last[STEEP, REFERENCE]:.3f}; guessing is "
        f"{chance(size):.3f}. The claim, that one scale goes at most {FAILS:.0%} of the way from guessing to float32's "
        f"loss and one each at least {TRAINS:.0%}, holds for {sum(holds)} of {len(holds)} seeds.",
        "",
        "What it takes for one scale to fail:",
        "",
        f"- {'Not depth' if milder[PLAIN, ONE] else 'Depth alone'}: in the plain model it ends at "
        f"{last[PLAIN, ONE]:.3f} against float32's {last[PLAIN, REFERENCE]:.3f}.",
        f"- {'Not gains' if milder[GAINS, ONE] else 'Gains'} alone, which set resblocks 2^20 apart: "
        f"{last[GAINS, ONE]:.3f}. A gradient times the value that it belongs to says how much "
        "the loss depends on that value, which no gain changes. So gains cannot move gradients farther apart than "
        "fp16 can hold the values, 2^30 or so, and it holds gradients over 2^40.",
        "- A constant in a hidden channel breaks that bond: the row of the matrix that reads it has gradients as many "
        f"times larger, while nothing is small. With a scale for each, that of its resblock, number {LOUD}, is "
        f"{'the lowest' if is_lowest else 'not the lowest'} of all in every seed: "
        f"2^{np.mean(np.log2(loud)):.1f}, of others up to 2^{FIRST_SCALE}. One scale for all ends at "
        f"2^{math.log2(one[0].scales[-1][0]):.0f}, where {np.mean(others):.1%} of the entries of the other resblocks "
        "are flushed.",
    ]


def chance(size: Size) -> float:
    """Nats a token of who knows nothing."""
    return math.log(size.model.image_vocab_size)


def way(last: float, reference: float, size: Size) -> float:
    """How much of the way from guessing to the reference's loss was gone."""
    return (chance(size) - last) / max(chance(size) - reference, 1e-9)


def draw(results: Sequence[Result], size: Size, path: Path) -> None:
    """As the paper's Figure 12: the scales; beside them what was flushed in each resblock, and losses."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    ):
        figure = Figure(figsize=(12, 7.2), layout="constrained")
        scales, flushed, losses, milder = figure.subplots(2, 2).flatten()
        each = of(results, STEEP, EACH)[0]
        for k in range(size.n_resblocks):
            style: dict[str, Any] = {"color": mpl.colormaps["viridis"](k / size.n_resblocks), "linewidth": 1}
            scales.plot([math.log2(values[k]) for values in each.scales], **style)
        one = of(results, STEEP, ONE)[0]
        scales.plot(
            [math.log2(values[0]) for values in one.scales], color=COLOURS[ONE], linewidth=2, linestyle="--", label=ONE
        )
        scales.plot([], color="#3b528b", label=f"each resblock; the lowest is number {LOUD}")
        finish(scales, "Gradient scales, steep setting", "update", "log2 of the scale")
        counted = [result for result in results if result.setting == STEEP and result.flushed and not result.seed]
        for i, result in enumerate(counted):
            places = np.arange(size.n_resblocks) + 0.2 * (i - 1.5)
            heights = [100 * value for value in late_flushes(result)]
            flushed.bar(places, heights, width=0.2, color=COLOURS[result.arm], label=result.arm)
        finish(flushed, "Matrix gradients flushed to zero, steep setting", "resblock", "% of entries")
        flushed.set_ylim(0, 130)
        flushed.legend(fontsize=8, ncols=2, loc="upper left", framealpha=1, edgecolor="none")
        flushed.set_yticks(range(0, 101, 25))
        for result in results:
            if result.setting == STEEP and not result.seed:
                curve(losses, result.losses, COLOURS[result.arm], result.arm)
            elif result.setting != STEEP:
                style_name = ":" if result.setting == GAINS else "-"
                curve(milder, result.losses, COLOURS[result.arm], f"{result.setting}: {result.arm}", style_name)
        finish(losses, "Loss, steep setting", "update", "nats an image token")
        finish(milder, "Loss, milder settings", "update", "nats an image token")
        figure.savefig(path, dpi=130)


def curve(axes: Any, values: Sequence[float], colour: str, label: str, style: str = "-") -> None:
    axes.plot(values, color=colour, linewidth=1.5, label=label, linestyle=style)


def finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8, framealpha=1, edgecolor="none")
    axes.grid(axis="y", color="#e6e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


COLOURS = {REFERENCE: "#1f2430", EACH: "#2563b8", ONE: "#e07b1a", NONE: "#b8325e", BF16: "#2a9d6f"}


if __name__ == "__main__":
    main()
