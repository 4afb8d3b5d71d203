"""One AdamW update of flat tensors with moments in any format: the settings of a step, and the update on a CPU.

The GPU's kernel (adam_kernels.py) does the same arithmetic in the same order, so that the two agree bit for bit where
their square roots do.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dalle_kernels.compression.formats import ADAM_MEAN, ADAM_VARIANCE, FORMATS, counter_bits, decode, encode

# Elements updated at a time: large enough that torch's time per call is small against the work, and small enough that
# what is worked on stays in the cache.
CHUNK = 2**18
N_SCRATCH = 6


@dataclass(frozen=True, kw_only=True)
class Update:
    """The numbers of one update; `rate` and `eps` include the corrections of the moments' bias towards 0."""

    beta1: float
    beta2: float
    rate: float
    eps: float
    decay: float
    variance_limit: float
    rounding: str
    seed: int
    step: int
    position: int

    @classmethod
    def at(cls, step: int, settings: dict[str, Any], seed: int, position: int) -> "Update":
        """Update number `step`, from 1, of a parameter group's settings."""
        beta1, beta2 = settings["betas"]
        root = math.sqrt(1 - beta2**step)
        return cls(
            beta1=beta1,
            beta2=beta2,
            rate=settings["lr"] * root / (1 - beta1**step),
            eps=settings["eps"] * root,
            decay=settings["lr"] * settings["weight_decay"],
            variance_limit=settings["variance_limit"],
            rounding=settings["rounding"],
            seed=seed,
            step=step,
            position=position,
        )


def update_on_cpu(
    weights: Tensor,
    gradients: Tensor,
    means: Tensor,
    variances: Tensor,
    compensation: Tensor | None,
    update: Update,
    scratch: tuple[Tensor, ...] = (),
) -> tuple[Tensor, ...]:
    """Updates one-dimensional weights (32 or 16 bits) and moments (float32 values or uint16 codes) in place.

    `compensation`, of the dtype of the weights, is needed for rounding "kahan". Returns the float32 memory it worked
    in, a few chunks, for the next call.
    """
    size = min(CHUNK, len(weights))
    if not scratch or len(scratch[0]) < size:
        scratch = tuple(torch.empty(size) for _ in range(N_SCRATCH))
    for start in range(0, len(weights), CHUNK):
        part = slice(start, min(start + CHUNK, len(weights)))
        n = part.stop - start
        w, g, mean, variance, *free = (tensor[:n] for tensor in scratch)
        gradient = gradients[part] if gradients.dtype == torch.float32 else g.copy_(gradients[part])
        mean = _update_mean(means[part], gradient, update, mean, free)
        variance = _update_variance(variances[part], gradient, update, variance, free)
        change = torch.sqrt(variance, out=g).add_(update.eps)
        change = torch.div(mean, change, out=g).mul_(update.rate)
        rest = None if compensation is None else compensation[part]
        _move(weights[part], change, rest, update, start, w, free)
    return scratch


def _update_mean(kept: Tensor, gradient: Tensor, update: Update, mean: Tensor, free: list[Tensor]) -> Tensor:
    is_code = kept.dtype == torch.uint16
    mean = decode(kept, ADAM_MEAN, out=mean, scale=update.beta1) if is_code else kept.mul_(update.beta1)
    mean.add_(torch.mul(gradient, 1 - update.beta1, out=free[0]))
    if is_code:
        encode(mean, ADAM_MEAN, out=kept, scratch=(free[0], free[1]))
    return mean


def _update_variance(kept: Tensor, gradient: Tensor, update: Update, variance: Tensor, free: list[Tensor]) -> Tensor:
    is_code = kept.dtype == torch.uint16
    variance = decode(kept, ADAM_VARIANCE, out=variance, scale=update.beta2) if is_code else kept.mul_(update.beta2)
    variance.add_(torch.mul(gradient, gradient, out=free[0]).mul_(1 - update.beta2))
    variance.clamp_(max=update.variance_limit)
    if is_code:
        encode(variance, ADAM_VARIANCE, out=kept, scratch=(free[0], free[1]))
    return variance


def _move(
    weights: Tensor, change: Tensor, rest: Tensor | None, update: Update, start: int, w: Tensor, free: list[Tensor]
) -> None:
    """weights -= change + decay * weights, rounded as the update says."""
    current = weights if weights.dtype == torch.float32 else w.copy_(weights)
    change.add_(torch.mul(current, update.decay, out=free[0]))
    if weights.dtype == torch.float32:
        weights.sub_(change)
    elif update.rounding == "kahan":
        assert rest is not None
        # What is kept is what was lost; the difference of neighbours is exact.
        change = torch.sub(free[0].copy_(rest), change, out=change)
        weights.copy_(torch.add(current, change, out=free[0]))
        rest.copy_(change.sub_(free[0].copy_(weights).sub_(current)))
    elif update.rounding == "stochastic":
        current.sub_(change)
        bits = counter_bits(
            update.position + start, update.seed, update.step, change.view(torch.int32), free[0].view(torch.int32)
        )
        target = weights.view(torch.uint16)
        encode(current, FORMATS[weights.dtype], random=bits, out=target, scratch=(free[0], free[1]))
    else:
        weights.copy_(current.sub_(change))
