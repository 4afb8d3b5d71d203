"""What the soak has seen, as a dated table."""

import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from parts.measuring import describe_machine

from dalle_ds.cli import PREEMPTED


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to run: how often it saves, and what may happen to it."""

    save_every: int
    kinds: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """An attempt that something ended: it began after step `began`, told of `reached`, and `newest` is saved."""

    kind: str
    phase: str
    codes: list[int]
    began: int
    reached: int
    newest: int
    in_save: bool
    """a checkpoint was being written when it fell, or could not be written"""
    problems: list[str]

    @property
    def steps_lost(self) -> int:
        return max(0, self.reached - self.newest)


@dataclass(frozen=True, kw_only=True)
class Result:
    """All of one arm; for each run that came to its end, what differs there from the undisturbed one."""

    arm: Arm
    steps: int
    outcomes: Sequence[Outcome]
    ends: Sequence[Sequence[str]]
    failures: Sequence[str]
    """of attempts that ended by themselves"""

    @property
    def is_clean(self) -> bool:
        return not (any(self.ends) or self.failures or any(outcome.problems for outcome in self.outcomes))


def report(results: Sequence[Result], seed: int, seconds: float) -> str:
    outcomes = [outcome for result in results for outcome in result.outcomes]
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    problems += [failure for result in results for failure in result.failures]
    n_lost = sum(problem.startswith("LOST") for problem in problems)
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    ends = [end for result in results for end in result.ends]
    lines = [
        f"# {len(outcomes)} kills of a training run, {today}",
        "",
        f"Machine: {describe_machine()}, deepspeed {metadata.version('deepspeed')}, {platform.system()}. "
        f"{seconds / 60:.1f} minutes, seed {seed}.",
        "",
        "`dalle-ds train-prior` on 4 gloo processes, 2 machines of 2 (ds_configs/cpu_hierarchical.json, smaller: fp16, "
        "no master weights, a gradient scale a resblock, CompactAdamW, PowerSGD of rank 4 in a width of 16 with 1-6-9 "
        "errors), averaged parameters, dropout, updates skipped now and then. After every kill: `--resume auto`.",
        "",
        f"**{len(outcomes)} kills, {n_lost} checkpoints lost, "
        f"{sum(not end for end in ends)} of {len(ends)} runs ended as the undisturbed run, bit for bit.**",
        "",
        "| checkpoint every | steps of a run | kills | runs to the end | last checkpoint and all losses equal | "
        "steps lost by a kill, at most |",
        "|---|---|---|---|---|---|",
        *(_arm_row(result) for result in results),
        "",
        "| what happened | kills | in the start-up | while a checkpoint was written | otherwise | "
        "asked to stop: ended with 85 | steps lost, at most |",
        "|---|---|---|---|---|---|---|",
        *(_kind_row(kind, outcomes) for kind in dict.fromkeys(outcome.kind for outcome in outcomes)),
        "",
        "Equal: weights, both moments, error buffers, gradient scales, averaged parameters, place in the data, "
        "learning rate, generators (the bytes of all files of the last checkpoint), and every line of metrics.jsonl "
        "but its times. After each kill all complete checkpoints were read and checked, and the newest compared with "
        "the undisturbed run's of the same step.",
        "",
        "With PowerSGD a save makes each machine's error buffers their mean: the same in exact arithmetic, other bits. "
        "So a run that saves at other steps is another run, bit for bit; each is compared with one that saves as "
        "often, and only the first arm, which saves after every step, is asked to stop.",
    ]
    if problems or any(ends):
        lines += ["", "Not as it should be:", "", *(f"- {problem}" for problem in problems)]
        lines += [f"- at the end of a run: {', '.join(end[:8])}" for end in ends if end]
    return "\n".join(lines) + "\n"


def _arm_row(result: Result) -> str:
    n_equal = sum(not end for end in result.ends)
    lost = max((outcome.steps_lost for outcome in result.outcomes), default=0)
    every = "step" if result.arm.save_every == 1 else f"{result.arm.save_every} steps"
    return f"| {every} | {result.steps} | {len(result.outcomes)} | {len(result.ends)} | {n_equal} | {lost} |"


def _kind_row(kind: str, outcomes: Sequence[Outcome]) -> str:
    own = [outcome for outcome in outcomes if outcome.kind == kind]
    starting = sum(outcome.phase == "start-up" and not outcome.in_save for outcome in own)
    saving = sum(outcome.in_save for outcome in own)
    stopped = sum(set(outcome.codes) == {PREEMPTED} for outcome in own) if kind == "stop" else "-"
    lost = max(outcome.steps_lost for outcome in own)
    return (
        f"| {LABELS[kind]} | {len(own)} | {starting} | {saving} | {len(own) - starting - saving} | {stopped} | {lost} |"
    )


LABELS = {
    "kill": "SIGKILL of a rank, at any moment",
    "stop": "SIGTERM or SIGUSR1 to a rank",
    "kill in a save": "SIGKILL of a rank in a save",
    "full disk": "a full disk, from some moment on",
}
