"""The scales of per-resblock gradient scaling (Appendix D): one a resblock, each ruled by its own gradients alone.

`models.gradient_scaling` applies them. Whoever updates parameters divides gradients by them, skips the update where any
resblock's gradients are not finite, and then calls `update`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dalle_ds.config import require


@dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """Rules of the scales (Appendix D); the defaults are the paper's, which gives no divisor.

    `divisor` 0 takes the power of two next to the root of the number of summands, by which the sum of independent
    numbers is larger than they are: to divide by their number would lose small gradients for nothing, not to divide at
    all large ones. Histograms of gradients (`--histogram_every`) show what there is room for.
    """

    initial_scale: float = 2.0**13
    growth: float = 2 ** (1 / 1000)  # after an update with finite gradients
    shrink: float = 2**0.5  # divides the scale of a resblock whose gradients are not all finite
    patience: int = 125  # updates after a division in which the same scale is not divided again
    lowest_scale: float = 2.0**7
    highest_scale: float = 2.0**24
    # Multiply the three scales by the number of data-parallel ranks, by which the loss is divided.
    per_rank: bool = True
    # What gradients are divided by before they are summed over the ranks of a machine, in their own dtype.
    divisor: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.growth >= 1, f"growth {self.growth} must be at least 1: it multiplies a scale; the paper's is 2^0.001"
        )
        require(self.shrink > 1, f"shrink {self.shrink} must be above 1: it divides a scale; the paper's is 2^0.5")
        require(self.patience >= 0, f"patience {self.patience} must not be negative; 0 divides at every update")
        require(self.lowest_scale > 0, f"lowest_scale {self.lowest_scale} must be positive, e.g. 128")
        require(
            self.lowest_scale <= self.initial_scale <= self.highest_scale,
            f"initial_scale {self.initial_scale} must lie between lowest_scale {self.lowest_scale} and highest_scale "
            f"{self.highest_scale}: change one of the three",
        )
        require(self.divisor >= 0, f"divisor {self.divisor} must not be negative; 0 takes one that suits the machines")

    def divisor_of(self, n_summands: int) -> float:
        return self.divisor or 2.0 ** round(math.log2(n_summands) / 2)


class GradientScales:
    """A scale for each of `n_blocks` resblocks, on `device`; changed in place, without waiting for the device.

    `values` float32 [n_blocks] is what gradients are multiplied by, `n_events` int64 [n_blocks] counts the updates in
    which a resblock's gradients were not all finite. The rules run in float64: in float32, 1,000 growths that ought to
    double a scale would make it too large by 5e-5, in float64 by 1e-13.
    """

    def __init__(self, options: ScalingOptions, n_blocks: int, n_ranks: int, device: torch.device | str) -> None:
        self.options = options
        self._unit = n_ranks if options.per_rank else 1
        self._exact = torch.full((n_blocks,), options.initial_scale * self._unit, dtype=torch.float64, device=device)
        self._wait = torch.zeros(n_blocks, dtype=torch.int64, device=device)  # updates until a division is allowed
        self.n_events = torch.zeros(n_blocks, dtype=torch.int64, device=device)
        self.values = self._exact.float()

    def update(self, nonfinite: Tensor) -> None:
        """Moves every scale once, given where gradients were not all finite in this update: bool [n_blocks].

        A scale grows where they were finite; else it is divided, or stays if it was divided in the last `patience`
        updates. Every rank must give the same.
        """
        divided = nonfinite & (self._wait == 0)
        unlike_before = torch.where(divided, self._exact / self.options.shrink, self._exact * self.options.growth)
        self._exact.copy_(torch.where(nonfinite & ~divided, self._exact, unlike_before))
        self._wait.sub_(1).clamp_(min=0).masked_fill_(divided, self.options.patience)
        self.n_events.add_(nonfinite)
        self._clamp()

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on, in numbers and lists."""
        return {
            "unit": self._unit,
            "scales": self._exact.tolist(),
            "wait": self._wait.tolist(),
            "n_events": self.n_events.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state; its scales are multiplied by the ratio of the numbers of ranks, where these count.

        An empty state, of a run without scaling, changes nothing. Raises InputError for another number of resblocks.
        """
        if not state:
            return
        n, n_saved = len(self._exact), len(state["scales"])
        require(
            n == n_saved, f"gradient scales of {n_saved} resblocks do not fit a model of {n}: resume the same model"
        )
        self._exact.copy_(torch.tensor(state["scales"], dtype=torch.float64) * (self._unit / state["unit"]))
        self._wait.copy_(torch.tensor(state["wait"]))
        self.n_events.copy_(torch.tensor(state["n_events"]))
        self._clamp()

    def _clamp(self) -> None:
        self._exact.clamp_(self.options.lowest_scale * self._unit, self.options.highest_scale * self._unit)
        self.values.copy_(self._exact)


class NoScaling:
    """Gradients as they come: what stands in for `GradientScales` when scaling is off."""

    values: Tensor | None = None
    n_events: Tensor | None = None

    def update(self, nonfinite: Tensor) -> None:
        """Nothing to move."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The state of a run with scaling is left aside."""
