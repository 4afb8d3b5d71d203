"""Plots of what keeps 16-bit training alive: scales and non-finite events by resblock, exponents of the gradients.

Resblock 2 * layer is a layer's attention and 2 * layer + 1 its MLP; the former are drawn in the first colour of the
page, the latter in the second.
"""

import math
from collections.abc import Sequence
from typing import Any

from dalle_ds.reporting.exponents import FP16, Exponents, Histogram
from dalle_ds.reporting.plots import GRID, INK, LINES, as_svg, drawing, over_counts, over_steps, plain, thin

SECOND_MLP = 3  # the resblock that Figure 12 tells from the others
N_POINT = 160  # of each line in a bundle: there may be 128 of them
RIDGE_INCHES, RIDGE_ROWS = 0.5, 1.1  # a row of the exponents, and how many rows the highest histogram takes
LOW, HIGH = 0.05, 0.95  # quantiles that a bar of exponents spans
FAINTEST = 1e-4  # share of the entries below which an exponent does not widen the picture


def scales_plot(name: str, steps: Sequence[float], scales: Sequence[Sequence[float]]) -> str:
    """log2 of the gradient scale of every resblock over steps, as Figure 12; `scales` has a list for each step."""
    from matplotlib.ticker import MaxNLocator

    with drawing(name, wide=True, height=3.4) as figure:
        axes = figure.add_subplot()
        n = len(scales[0])
        faint = max(0.25, 0.9 - n / 64)
        for resblock in range(n):
            values = [math.log2(row[resblock]) if row[resblock] > 0 else math.nan for row in scales]
            shown = thin(steps, values, n=N_POINT)
            if resblock == SECOND_MLP:
                axes.plot(*shown, color=LINES[2], linewidth=2.2, zorder=4)
            else:
                axes.plot(*shown, color=_colour(resblock), linewidth=1.1, alpha=faint, zorder=2 + resblock % 2)
        low, high = axes.get_ylim()
        axes.set_ylim(math.floor(low) - 0.1, math.ceil(high) + 0.1)  # whole bits, at least one
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_ylabel("log2 of the scale", color=INK)
        over_steps(axes)
        plain(axes)
        return as_svg(figure, name, "gradient scale of each resblock over steps")


def events_plot(name: str, n_events: Sequence[float]) -> str:
    """A bar for each resblock: how many updates found non-finite gradients in it."""
    with drawing(name) as figure:
        axes = figure.add_subplot()
        for half in range(2):
            places = range(half, len(n_events), 2)
            axes.bar(places, [n_events[i] for i in places], width=0.8, color=LINES[half], linewidth=0)
        over_counts(axes, max(n_events))
        _over_resblocks(axes)
        return as_svg(figure, name, "updates with non-finite gradients in each resblock")


def kinds_plot(name: str, first: Exponents, last: Exponents) -> str:
    """A row for each kind of parameter: its exponents at the last step, filled, and at the first one, as a line.

    The band at the left is what fp16 flushes to zero without any scale.
    """
    kinds = list(last.kinds)
    low, high = _reach([*first.kinds.values(), *last.kinds.values()])
    with drawing(name, wide=True, height=0.9 + RIDGE_INCHES * len(kinds)) as figure:
        axes = figure.add_subplot()
        edge = FP16.smallest - 1
        if low < edge:
            axes.axvspan(low, edge, color=GRID, alpha=0.45, linewidth=0)
        peak = max([share for histogram in last.kinds.values() for share in histogram.shares()[1]], default=1.0)
        for row, kind in enumerate(kinds):
            base = len(kinds) - 1 - row
            for exponents, is_last in ((last, True), (first, False)):
                histogram = exponents.kinds.get(kind)
                if histogram is not None and (is_last or first.step != last.step):
                    _ridge(axes, histogram, base, RIDGE_ROWS / (peak or 1.0), is_last, z=2 * row + 2)
        axes.set_yticks(range(len(kinds)), reversed(kinds))
        axes.set_ylim(-0.1, len(kinds) - 1 + RIDGE_ROWS + 0.1)
        axes.set_xlabel("log2 of the gradient's entries", color=INK)
        plain(axes)
        axes.grid(visible=False)
        axes.set_xlim(low, high)
        return as_svg(figure, name, "exponents of the gradients of each kind of parameter")


def resblocks_plot(name: str, exponents: Exponents) -> str:
    """Median and middle nine tenths of the exponents of each resblock: from the first to the last, how they fall."""
    with drawing(name, wide=True) as figure:
        axes = figure.add_subplot()
        for resblock, histogram in enumerate(exponents.resblocks):
            median = None if histogram is None else histogram.quantile(0.5)
            if histogram is None or median is None:
                continue
            colour = _colour(resblock)
            span = [histogram.quantile(share) for share in (LOW, HIGH)]
            axes.plot([resblock] * 2, span, color=colour, linewidth=1.6, alpha=0.4, solid_capstyle="round")
            axes.plot([resblock], [median], color=colour, marker="o", markersize=3)
        _over_resblocks(axes)
        return as_svg(figure, name, "exponents of the gradients of each resblock")


def _ridge(axes: Any, histogram: Histogram, base: float, height: float, is_last: bool, z: int) -> None:
    """One histogram as an outline over its line, filled at the last step."""
    exponents, shares = histogram.shares()
    edges = [exponents[0], *(exponent + 1 for exponent in exponents)]
    tops = [base + height * share for share in shares]
    xs = [edge for edge in edges for _ in range(2)]
    ys = [base, *(top for top in tops for _ in range(2)), base]
    if is_last:
        axes.fill_between(xs, ys, base, color=LINES[0], alpha=0.3, linewidth=0, zorder=z)
        axes.plot(xs, ys, color=LINES[0], linewidth=1.4, zorder=z)
    else:
        axes.plot(xs, ys, color=LINES[1], linewidth=1.1, alpha=0.8, zorder=z + 1)


def _reach(histograms: Sequence[Histogram]) -> tuple[int, int]:
    """Exponents from and to which the histograms have more than a trace."""
    wide = [e for h in histograms for e, share in zip(*h.shares(), strict=True) if share >= FAINTEST]
    return (min(wide) - 1, max(wide) + 2) if wide else (FP16.smallest, FP16.largest)


def _over_resblocks(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("resblock", color=INK)
    plain(axes)


def _colour(resblock: int) -> str:
    return LINES[resblock % 2]
