"""Schedules as pure functions of the step (paper: Appendices A.2 and B.2)."""

import math


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
