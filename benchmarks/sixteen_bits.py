"""The claim: fp16 with per-resblock scaling and 16-bit moments trains as float32 AdamW does, within 1% of its loss.

    python benchmarks/sixteen_bits.py [--demo demo] [--steps 200] [--seeds 3] [--processes 2] [--quick]

Small priors on what `make demo` trains its prior on, through the real engine at ZeRO-3: float32 AdamW, all pieces of
16-bit training together, and each piece alone. Every arm differs from another in sections of the DeepSpeed JSON alone;
a seed gives all arms the same first weights and batches. Writes benchmarks/results/<date>-sixteen-bits.md and .png.
About 15 minutes of CPU.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts import demo_tokens
from parts.engines import ds_config, in_processes, make_engine, matrix_state_bytes, prior_config
from parts.measuring import ROOT, describe_machine, results_path
from rich.progress import track

from dalle_ds.training.engine import backward, set_learning_rate
from dalle_ds.training.schedules import warmup_cosine

TOLERANCE = 0.01  # of the loss of float32
REFERENCE = "float32 AdamW"
LEARNING_RATE, WARMUP, FINAL = 4e-3, 0.1, 0.02  # the demo's; warm-up as a fraction of the steps
TAIL = 0.1  # of the steps, whose mean loss is the last training loss

FP16, BF16 = {"fp16": {"enabled": True, "loss_scale": 1}}, {"bf16": {"enabled": True}}
SCALED, MIXED = {"resblock_gradient_scaling": {}}, {"mixed_precision": {}}
NO_MASTER = {"mixed_precision": {"master_weights": False}}


def compact(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "CompactAdamW", "params": params}}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train: what it changes in the DeepSpeed JSON of float32, and whether the claim is of it."""

    changes: Mapping[str, Any]
    claims: bool = False


ARMS = {
    REFERENCE: Arm(changes={}),
    "fp16, scaling, 16-bit moments": Arm(changes={**FP16, **SCALED, **compact()}, claims=True),
    "the same without a master copy, stochastic": Arm(
        changes={**FP16, **SCALED, **NO_MASTER, **compact()}, claims=True
    ),
    "16-bit moments alone, float32": Arm(changes=compact()),
    "fp16, scaling": Arm(changes={**FP16, **SCALED}),
    "fp16, one global scale": Arm(changes={"fp16": {"enabled": True}, **MIXED}),
    "bf16, no scaling": Arm(changes={**BF16, **MIXED}),
    "fp16, scaling, no master copy, nearest": Arm(
        changes={**FP16, **SCALED, **NO_MASTER, **compact(moment_bits=32, rounding="nearest")}
    ),
    "fp16, scaling, no master copy, stochastic": Arm(
        changes={**FP16, **SCALED, **NO_MASTER, **compact(moment_bits=32, rounding="stochastic")}
    ),
    "fp16, scaling, no master copy, kahan": Arm(
        changes={**FP16, **SCALED, **NO_MASTER, **compact(moment_bits=32, rounding="kahan")}
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all arms share."""

    demo: Path
    steps: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 16
    n_train: int = 4_000
    n_validation: int = 256
    n_layer: int = 3
    n_head: int = 4
    head_dim: int = 16


@dataclass(frozen=True, kw_only=True)
class Result:
    """One training."""

    arm: str
    seed: int
    losses: list[float]
    validation: float
    skipped: int
    state_bytes: dict[str, float]
    """of each parameter of the resblocks' matrices, by kind"""
    seconds: float  # of CPU

    @property
    def training(self) -> float:
        return float(np.mean(self.losses[-max(1, round(TAIL * len(self.losses))) :]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="folder that `make demo` has filled")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seeds", type=int, default=len(Settings.seeds))
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, of one thread each")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, to see that all works")
    parser.add_argument("--out", type=Path, default=results_path("").parent, help="folder of the table and the plot")
    args = parser.parse_args(arguments)
    if not demo_tokens.is_there(args.demo):
        print(f"needs the data of the demo, which {args.demo} does not hold: run make demo, or give --demo")
        return
    settings = Settings(demo=args.demo, steps=args.steps, seeds=tuple(range(args.seeds)))
    if args.quick:
        settings = Settings(demo=args.demo, steps=2, seeds=(0,), batch_size=2, n_train=8, n_validation=4, n_layer=1)
    began = time.time()
    tasks = [(name, seed, settings) for seed in settings.seeds for name in ARMS]
    trained = in_processes(train, tasks, 1 if args.quick else args.processes)
    results = list(track(trained, "training priors", total=len(tasks)))
    stem = args.out / results_path("sixteen-bits").stem
    draw(results, settings, stem.with_suffix(".png"))
    text = report(results, settings, stem.with_suffix(".png").name, time.time() - began)
    stem.with_suffix(".md").write_text(text)
    print(f"\n{text}\n{stem}.md")


def train(task: tuple[str, int, Settings]) -> Result:
    """Trains an arm from a seed; the validation loss is that of the engine, in its own precision."""
    name, seed, settings = task
    began = time.process_time()
    tokens = demo_tokens.load(settings.demo, "train", settings.n_train)
    validation = demo_tokens.load(settings.demo, "validation", settings.n_validation)
    config = ds_config(settings.batch_size, LEARNING_RATE, ARMS[name].changes)
    model = prior_config(tokens, settings.n_layer, settings.n_head, settings.head_dim)
    engine = make_engine(model, config, seed)
    losses = []
    for step in range(settings.steps):
        set_learning_rate(engine, warmup_cosine(step, round(WARMUP * settings.steps), FINAL, settings.steps))
        loss = engine(*tokens.batch(settings.batch_size, seed, step))["loss"]
        backward(engine, loss)
        engine.step()
        losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        held_out = [engine(*batch)["loss"].item() for batch in validation.batches(settings.batch_size)]
    result = Result(
        arm=name,
        seed=seed,
        losses=losses,
        validation=float(np.mean(held_out)),
        skipped=engine.skipped_steps,
        state_bytes=matrix_state_bytes(engine),
        seconds=time.process_time() - began,
    )
    engine.destroy()
    return result


def report(results: Sequence[Result], settings: Settings, plot: str, seconds: float) -> str:
    """The whole page: machine, setting, figures of each arm, and whether the claim holds."""
    cpu = np.median([result.seconds for result in results])
    return "\n".join(
        [
            f"# Training in sixteen bits, piece by piece, {results_path('').name[:10]}",
            "",
            f"Machine: {describe_machine()}. {seconds / 60:.1f} minutes; one training {cpu:.0f} s of CPU (median).",
            "",
            f"The demo's tokens of made scenes. {settings.n_layer} layers of width "
            f"{settings.n_head * settings.head_dim}, {settings.steps} updates of {settings.batch_size} pictures, "
            f"{len(settings.seeds)} seeds, ZeRO-3 on one process. Learning rate {LEARNING_RATE:g}, warmed up over "
            f"{WARMUP:.0%} of the updates, then along a cosine to {FINAL:.0%}. Scales by the paper's rules. Training "
            f"loss: the mean over the last {TAIL:.0%} of the updates; validation: {settings.n_validation} pictures. In "
            "nats, mean over seeds (lowest to highest). Ratios are taken seed by seed to float32's. Bytes: what the "
            "engine holds for each parameter of the resblocks' matrices: weights + float32 copies + moments + "
            "gradients.",
            "",
            "| arm | bytes | training loss | of float32 | validation loss | of float32 | skipped updates |",
            "|---|---|---|---|---|---|---|",
            *(row(name, results) for name in ARMS),
            "",
            *(verdict(name, results) for name, arm in ARMS.items() if arm.claims),
            "",
            f"![Loss over float32's, update by update]({plot})",
            "",
        ]
    )


def row(name: str, results: Sequence[Result]) -> str:
    own = [result for result in results if result.arm == name]
    training, validation = ratios(name, "training", results), ratios(name, "validation", results)
    skipped = ", ".join(str(result.skipped) for result in own)
    held = own[0].state_bytes.values()
    cells = [
        f"{' + '.join(f'{size:g}' for size in held)} = {sum(held):g}",
        spread([result.training for result in own]),
        spread(training),
        spread([result.validation for result in own]),
        spread(validation),
        skipped,
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def ratios(name: str, figure: str, results: Sequence[Result]) -> list[float]:
    """The figure of an arm over float32's, for each seed."""
    reference = {result.seed: getattr(result, figure) for result in results if result.arm == REFERENCE}
    return [getattr(result, figure) / reference[result.seed] for result in results if result.arm == name]


def verdict(name: str, results: Sequence[Result]) -> str:
    """Whether the mean over seeds of both losses is within the tolerance of float32's."""
    means = [float(np.mean(ratios(name, figure, results))) for figure in ("training", "validation")]
    # Within, or better.
    word = "holds" if max(means) <= 1 + TOLERANCE else "**fails**"
    figures = f"training {means[0] - 1:+.2%}, validation {means[1] - 1:+.2%}"
    return f"- {name}: {figures} against float32; the claim (at most {TOLERANCE:+.0%}) {word}."


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def draw(results: Sequence[Result], settings: Settings, path: Path) -> None:
    """Loss over float32's, smoothed, mean over seeds: what is given is on the left, each piece alone on the right."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    width = max(1, settings.steps // 12)
    kernel = np.ones(width) / width
    reference = {result.seed: result.losses for result in results if result.arm == REFERENCE}
    together = [name for name, arm in ARMS.items() if arm.claims]
    panels = {
        "All together": together,
        "Gradients: what scales them": ["fp16, scaling", "fp16, one global scale", "bf16, no scaling"],
        "State: moments, and no master copy": [name for name in ARMS if "alone" in name or "no master" in name],
    }
    with mpl.rc_context(
        {"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    ):
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        for axes, (title, names) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
            for name, colour in zip(names, COLOURS, strict=False):
                curves = [
                    np.convolve(r.losses, kernel, "valid") / np.convolve(reference[r.seed], kernel, "valid") - 1
                    for r in results
                    if r.arm == name
                ]
                steps = np.arange(len(curves[0])) + width
                values = 100 * np.array(curves)
                axes.plot(steps, values.mean(0), color=colour, linewidth=1.6, label=name)
                axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
            axes.axhspan(-100 * TOLERANCE, 100 * TOLERANCE, color="#e6e8ec", zorder=0)
            axes.set_title(title)
            axes.set_xlabel("update")
            axes.legend(fontsize=7.5, framealpha=1, edgecolor="none")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.axes[0].set_ylabel("training loss over float32's, %")
        figure.axes[0].set_ylim(-6, 6)
        figure.savefig(path, dpi=130)


COLOURS = ("#2563b8", "#e07b1a", "#2a9d6f", "#b8325e")


if __name__ == "__main__":
    main()
