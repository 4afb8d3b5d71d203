"""Histograms of log2|gradient entries| by kind of parameter: how many a 16-bit format would lose (Appendix D).

A line of histograms.jsonl: {"step", "kind": "gradients", "time", "kinds": {kind: histogram}, "resblocks": [histogram,
...]} with histogram = {"first": the lowest exponent there is, "counts": entries of |x| in [2^e, 2^(e+1)) for e = first
and on, "zeros": ..., "nonfinite": ...}. Entries are those of a micro-step's part of the gradient as they come to be
unscaled, without any scale or constant, and counted over all ranks: at stage 3 of the mean over a machine, or all ranks
where there are no machines; at lower stages of the mean over all ranks, or of each rank where gradients are compressed.
"""

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.training.agreement import is_first
from dalle_ds.training.engine import Engine
from dalle_ds.training.gradient_path import Unscaling
from dalle_ds.training.metrics import MetricsLog

# Exponents of float32, its subnormal numbers included.
LOWEST, HIGHEST = -149, 127
N_EXPONENT = HIGHEST - LOWEST + 1
ZERO, NONFINITE, N_BIN = N_EXPONENT, N_EXPONENT + 1, N_EXPONENT + 2
# torch.histc counts in float32, which is exact to 2^24.
PIECE = 2**24


@torch.no_grad()
def count_exponents(values: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Counts int64 [N_BIN] of floor(log2|x|) over x = values / scale in float32, of zeros, and of what is not finite.

    `values` may have any shape and any floating dtype up to float32. Nothing waits for the device.
    """
    counts = torch.zeros(N_BIN, dtype=torch.int64, device=values.device)
    for piece in torch.split(values.flatten(), PIECE):
        x = piece.float() / scale
        place = torch.frexp(x).exponent - (1 + LOWEST)
        place = torch.where(x == 0, ZERO, place)
        place = torch.where(torch.isfinite(x), place, NONFINITE)
        counts += torch.histc(place.float(), bins=N_BIN, min=0, max=N_BIN).long()
    return counts


def parameter_kind(name: str) -> str:
    """The kind of a parameter of that name: one of KINDS."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


class GradientHistograms:
    """Gathers gradients of a step, tensor by tensor, and writes their histograms over all ranks as one line.

    `every` is the number of steps between lines, 0 for none; `log` is that of the first rank and None elsewhere.
    """

    def __init__(
        self, every: int, n_resblocks: int, device: torch.device | str, log: MetricsLog | None, *, counts: bool = True
    ) -> None:
        """`counts`: whether what this rank is shown is its own, and not what another counts too."""
        self.every, self.log, self.is_counting = every, log, counts
        self.counts = torch.zeros(len(KINDS) + n_resblocks, N_BIN, dtype=torch.int64, device=device)

    @classmethod
    def of(cls, engine: Engine, every: int, log: MetricsLog | None) -> "GradientHistograms":
        """For an engine's gradients: where each rank sees all of the mean over ranks, the first counts alone."""
        is_same = engine.zero_optimization_stage() == 0 and engine.extras.path is None
        counts = not is_same or is_first()
        return cls(every, engine.extras.n_resblocks, engine.device, log, counts=counts)

    def is_due(self, step: int) -> bool:
        """Whether the gradients of step `step` (from 1) are asked for."""
        return self.every > 0 and step % self.every == 0

    def begin(self, step: int, unscaling: Unscaling | None) -> None:
        """Has the gradients of the step counted as they come to be unscaled, if they are asked for."""
        if unscaling is not None:
            unscaling.watch = self.add if self.is_due(step) and self.is_counting else None

    def end(self, step: int) -> None:
        if self.is_due(step):
            self.write(step)

    def add(self, name: str, resblock: int | None, gradient: Tensor, scale: Tensor | float = 1.0) -> None:
        """Counts (a part of) the gradient of parameter `name` of a resblock, which is `scale` times too large."""
        counts = count_exponents(gradient, scale)
        self.counts[list(KINDS).index(parameter_kind(name))] += counts
        if resblock is not None:
            self.counts[len(KINDS) + resblock] += counts

    def write(self, step: int) -> None:
        """Sums what was added over all ranks, writes it as a line, and begins anew; every rank must call."""
        dist.all_reduce(self.counts)
        if self.log is not None:
            rows = [as_histogram(counts) for counts in self.counts.tolist()]
            kinds = {kind: row for kind, row in zip(KINDS, rows, strict=False) if row is not None}
            self.log.write(step, "gradients", {"kinds": kinds, "resblocks": rows[len(KINDS) :]})
        self.counts.zero_()


def as_histogram(counts: list[int]) -> dict[str, Any] | None:
    """The JSON form of the counts [N_BIN]; None of nothing at all."""
    if not any(counts):
        return None
    filled = [i for i, n in enumerate(counts[:N_EXPONENT]) if n] or [0]
    first, last = filled[0], filled[-1]
    return {
        "first": LOWEST + first,
        "counts": counts[first : last + 1],
        "zeros": counts[ZERO],
        "nonfinite": counts[NONFINITE],
    }


# Kind of parameter -> what the names of such parameters hold; the first that fits. Matrices of resblocks have 16 bits,
# all else 32.
KINDS = {
    "attention matrices": r"\battention\.\w+\.weight$",
    "MLP matrices": r"\bmlp\.\w+\.weight$",
    "gains": r"(norm|_end\.\d+)\.weight$",
    "biases": r"(\.bias|\.b)$",
    "embeddings": r"_states\.tokens$",
    "positions": r"_states\.(position|pad|row|column|start)$",
    "unembeddings": r"\.unembed\.weight$",
    "other": r"",
}
