"""Schedules: pure functions of the step, and learning rates that may also follow the loss (Appendices A.2 and B.2)."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.config import PriorScheduleConfig
from dalle_ds.training.agreement import is_first

HALF = 0.5


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at `steps` along half a cosine, then constant; `end` at once when steps is 0."""
    if step >= steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def warmup(step: int, steps: int) -> float:
    """A linear ramp that first moves at step 0: (step + 1) / steps, at most 1."""
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0


def warmup_cosine(step: int, warmup_steps: int, final: float, steps: int) -> float:
    """A multiplier of the peak learning rate: a linear ramp, then a cosine that reaches `final` at `steps`."""
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    return cosine(step - warmup_steps, 1.0, final, steps - warmup_steps)


class LearningRate(Protocol):
    """A multiplier of the peak learning rate, the same on all ranks; every rank calls everything."""

    def multiplier(self, step: int) -> float:
        """What step `step` (from 0) is to be done with."""
        ...

    def observe(self, step: int, loss: Tensor) -> bool:
        """Takes in this rank's loss of step `step`, once a step and in order; whether that halved the rate."""
        ...

    def halve(self) -> None:
        """Halves the rate from the next step on, by hand."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on, in JSON values and the same on all ranks."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ScheduledRate:
    """A learning rate that is a function of the step, and is only ever halved by hand."""

    def __init__(self, schedule: Callable[[int], float]) -> None:
        self.schedule, self.n_halved = schedule, 0

    def multiplier(self, step: int) -> float:
        return self.schedule(step) * HALF**self.n_halved

    def observe(self, step: int, loss: Tensor) -> bool:
        return False

    def halve(self) -> None:
        self.n_halved += 1

    def state_dict(self) -> dict[str, Any]:
        return {"n_halved": self.n_halved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_halved = state["n_halved"]


def sum_over_ranks(values: Tensor) -> list[float]:
    """The sum of all ranks' `values`, on every rank."""
    total = values.clone()
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


class PlateauRate:
    """A linear warm-up, then halved whenever the training loss no longer falls, `halvings` times (Appendix B.2).

    The paper halved by hand, and says no more than that; this is our rule. The steps after the warm-up are cut into
    windows of `window` steps. At the end of each the mean of its losses, over all its steps and ranks, is looked at: it
    is good when it lies below that of the last good one by more than `improvement` of its magnitude; the first is good.
    After `patience` bad ones in a row the rate is halved from the next step on, and their count begins anew, so that a
    rate lasts for `patience` windows at least.

    A halving by hand counts among the `halvings` and gives the new rate its patience too; it may also go beyond them.
    The rule looks at nothing but losses and steps, each step once: how often a run logs, saves or is stopped changes
    nothing. Losses are summed in float64, where sums of float32 numbers of like size are exact, so neither the number
    of ranks nor a stop in a window changes a sum.
    """

    def __init__(
        self,
        *,
        warmup_steps: int,
        window: int,
        improvement: float,
        patience: int,
        halvings: int,
        sum_over_ranks: Callable[[Tensor], list[float]] = sum_over_ranks,
    ) -> None:
        assert window >= 1
        assert patience >= 1
        self.warmup_steps, self.window, self.improvement = warmup_steps, window, improvement
        self.patience, self.halvings, self.sum_over_ranks = patience, halvings, sum_over_ranks
        self.n_halved = self.n_bad = 0
        self.best: float | None = None
        self.seen = torch.zeros(2, dtype=torch.float64)  # of this window and rank: sum of losses, their number

    def multiplier(self, step: int) -> float:
        return warmup(step, self.warmup_steps) * HALF**self.n_halved

    def observe(self, step: int, loss: Tensor) -> bool:
        value = loss.detach().double()
        self.seen = self.seen.to(value.device)  # where a state is summed too
        if step < self.warmup_steps or self.n_halved >= self.halvings:
            return False
        self.seen += torch.stack([value, torch.ones_like(value)])
        if (step + 1 - self.warmup_steps) % self.window:
            return False
        total, n = self.sum_over_ranks(self.seen)
        self.seen.zero_()
        return self._judge(total / n)

    def _judge(self, mean: float) -> bool:
        """Takes in the mean of a window; whether the rate is halved."""
        if self.best is None or mean < self.best - self.improvement * abs(self.best):
            self.best, self.n_bad = mean, 0
            return False
        self.n_bad += 1
        if self.n_bad < self.patience:
            return False
        self.halve()
        return True

    def halve(self) -> None:
        self.n_halved += 1
        self.n_bad = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "n_halved": self.n_halved,
            "n_bad": self.n_bad,
            "best": self.best,
            "seen": self.sum_over_ranks(self.seen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # A run that followed another rule has no more than halvings by hand.
        self.n_halved, self.n_bad, self.best = state["n_halved"], state.get("n_bad", 0), state.get("best")
        # One rank goes on with what all had seen: the sum is the same, for any number of ranks.
        self.seen = torch.tensor(state.get("seen", [0.0, 0.0]) if is_first() else [0.0, 0.0], dtype=torch.float64)


def prior_learning_rate(schedule: PriorScheduleConfig) -> LearningRate:
    """The learning rate of stage 2, of the kind that the schedule names."""
    return PRIOR_RATES[schedule.lr_rule](schedule)


def _plateau_rate(schedule: PriorScheduleConfig) -> LearningRate:
    return PlateauRate(
        warmup_steps=schedule.lr_warmup_steps,
        window=schedule.plateau_window,
        improvement=schedule.plateau_improvement,
        patience=schedule.plateau_patience,
        halvings=schedule.lr_halvings,
    )


def _cosine_rate(schedule: PriorScheduleConfig) -> LearningRate:
    return ScheduledRate(
        lambda step: warmup_cosine(step, schedule.lr_warmup_steps, schedule.lr_final_multiplier, schedule.lr_steps)
    )


# Names are those of config.LR_RULES.
PRIOR_RATES = {"plateau": _plateau_rate, "cosine": _cosine_rate}
