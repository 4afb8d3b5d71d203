"""Histograms of gradient exponents as training leaves them in histograms.jsonl, and what a 16-bit format does to them.

See training/histograms.py for the form of a line; Appendix D for why one looks.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Share of the entries that a constant may flush to zero and still be offered.
TOLERABLE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Format:
    """A 16-bit float by its exponents: of its smallest subnormal number, and of its largest number."""

    name: str
    smallest: int
    largest: int


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Numbers of entries of |x| in [2^e, 2^(e+1)), for e from `first` on; of zeros; of what is not finite."""

    first: int
    counts: list[int]
    zeros: int
    nonfinite: int

    @property
    def n_entry(self) -> int:
        """All entries but those that are not finite."""
        return sum(self.counts) + self.zeros

    def shares(self) -> tuple[list[int], list[float]]:
        """Exponents, and the share of the finite entries that each has."""
        exponents = list(range(self.first, self.first + len(self.counts)))
        return exponents, [n / max(1, self.n_entry) for n in self.counts]

    def quantile(self, share: float) -> float | None:
        """log2|x| below which `share` of the entries other than 0 lie, even within a bin; None without such entries."""
        wanted = share * sum(self.counts)
        if not any(self.counts):
            return None
        seen = 0.0
        for exponent, n in enumerate(self.counts, self.first):
            if n and seen + n >= wanted:
                return exponent + (wanted - seen) / n
            seen += n
        return float(self.first + len(self.counts))

    def flushed(self, format: Format, constant: int = 0) -> float:
        """Share of the entries other than 0 that `format` rounds to 0, after they are multiplied by 2^constant.

        From half the smallest number on they are rounded up.
        """
        lost = sum(n for e, n in enumerate(self.counts, self.first) if e + constant < format.smallest - 1)
        return lost / max(1, sum(self.counts))

    def overflowing(self, format: Format, constant: int = 0) -> float:
        """Share of the entries other than 0 that are too large for `format`, after the same."""
        lost = sum(n for e, n in enumerate(self.counts, self.first) if e + constant > format.largest)
        return lost / max(1, sum(self.counts))

    def constants(self, format: Format) -> tuple[int, int] | None:
        """Exponents of the least and the largest power of two by which entries may be multiplied before rounding.

        With those nothing overflows and at most TOLERABLE is flushed; None where no power of two does both.
        """
        if not any(self.counts):
            return None
        most = format.largest - (self.first + len(self.counts) - 1)
        if self.flushed(format, most) > TOLERABLE:
            return None
        least = most
        while self.flushed(format, least - 1) <= TOLERABLE:
            least -= 1
        return least, most


@dataclass(frozen=True, kw_only=True)
class Exponents:
    """The histograms of one step, by kind of parameter and by resblock."""

    step: int
    kinds: dict[str, Histogram]
    resblocks: list[Histogram | None]


def read_exponents(path: Path) -> list[Exponents]:
    """The lines of histograms.jsonl by step, of a step written twice the later one; without those that do not read."""
    found: dict[int, Exponents] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
            kinds = {str(kind): _histogram(value) for kind, value in line["kinds"].items()}
            resblocks = [None if value is None else _histogram(value) for value in line["resblocks"]]
            found[int(line["step"])] = Exponents(step=int(line["step"]), kinds=kinds, resblocks=resblocks)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return [found[step] for step in sorted(found)]


def _histogram(value: dict[str, Any]) -> Histogram:
    return Histogram(
        first=int(value["first"]),
        counts=[int(n) for n in value["counts"]],
        zeros=int(value["zeros"]),
        nonfinite=int(value["nonfinite"]),
    )


FP16 = Format(name="fp16", smallest=-24, largest=15)
# The paper's format of error buffers and running means (Appendix D), with the bias that dalle_kernels.compression gives
# it.
CUSTOM = Format(name="1-6-9", smallest=-67, largest=3)
FORMATS = (FP16, Format(name="bf16", smallest=-133, largest=127), CUSTOM)
