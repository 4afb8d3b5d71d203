"""Curves as inline SVG that follows the page: text and lines take their colours from CSS variables.

matplotlib draws in placeholder colours, which are then replaced by `var(--...)`, so that one picture serves
light and dark pages alike. Captions and legends are the page's business.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WIDTH_INCHES, WIDE_INCHES, HEIGHT_INCHES = 5.0, 10.4, 2.7
MAX_POINTS = 500  # more than a plot has pixels to show
SMOOTHING_FRACTION = 40  # the smoothed line averages over one part in so many of the points
MIN_POINTS_TO_SMOOTH = 60
MAX_MARKED_POINTS = 20

# Placeholder colour -> what stands in the page's style sheet.
INK, GRID = "#010203", "#010204"
LINES = ("#010211", "#010212", "#010213")
VARIABLES = {
    INK: "var(--soft)",
    GRID: "var(--rule)",
    **{colour: f"var(--line-{i})" for i, colour in enumerate(LINES, 1)},
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a plot; `colour` counts from 1 and is the page's `--line-<colour>`."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int = 1


def line_plot(
    name: str,
    curves: Sequence[Curve],
    *,
    log_x: bool = False,
    wide: bool = False,
    smooth: bool = False,
    counts: bool = False,
) -> str:
    """The curves over steps as an `<svg>` element. `name` keeps its ids apart from those of other plots.

    `log_x` spaces steps logarithmically (step 0 is left out); `smooth` draws a noisy curve pale, with its
    running mean on top; `counts` are whole numbers from 0 on.
    """
    with drawing(name, wide=wide) as figure:
        axes = figure.add_subplot()
        for curve in curves:
            _draw(axes, curve, log_x=log_x, smooth=smooth)
        if log_x:
            axes.set_xscale("log")
        over_steps(axes, log_x=log_x)
        if counts:
            over_counts(axes, max(max(curve.values) for curve in curves))
        plain(axes)
        return as_svg(figure, name, ", ".join(curve.label for curve in curves))


@contextmanager
def drawing(name: str, *, wide: bool = False, height: float = HEIGHT_INCHES) -> Iterator[Any]:
    """A matplotlib figure of the page's size and settings; ids in it depend on `name` alone."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9}):
        yield Figure(figsize=(WIDE_INCHES if wide else WIDTH_INCHES, height), layout="constrained")


def over_steps(axes: Any, *, log_x: bool = False) -> None:
    """Makes steps of the x axis."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if not log_x:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("step", color=INK)


def over_counts(axes: Any, most: float) -> None:
    """Makes whole numbers from 0 to a little above `most` of the y axis."""
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(0, max(1.0, 1.05 * most))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def plain(axes: Any) -> None:
    """The look of all plots: a line below, and pale lines at the values."""
    axes.minorticks_off()
    axes.margins(x=0.015)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def as_svg(figure: Any, name: str, label: str) -> str:
    """The figure as an `<svg>` element in the page's colours."""
    buffer = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _inline(buffer.getvalue(), name, label)


def thin(
    steps: Sequence[float], values: Sequence[float], *, log_x: bool = False, n: int = MAX_POINTS
) -> tuple[list[float], list[float]]:
    """At most about `n` points: the means of neighbours, in buckets even in step (or in its logarithm)."""
    points = [(step, value) for step, value in zip(steps, values, strict=True) if step > 0 or not log_x]
    if len(points) <= n:
        return [step for step, _ in points], [value for _, value in points]
    place = math.log if log_x else float
    low, high = place(points[0][0]), place(points[-1][0])
    buckets: dict[int, list[tuple[float, float]]] = {}
    for step, value in points:
        buckets.setdefault(int((place(step) - low) / (high - low) * n), []).append((step, value))
    means = [tuple(sum(column) / len(bucket) for column in zip(*bucket, strict=True)) for bucket in buckets.values()]
    return [step for step, _ in means], [value for _, value in means]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean over `width` neighbours on each side, and over as many on both sides near the ends."""
    means = []
    for i in range(len(values)):
        reach = min(width, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


def _draw(axes, curve: Curve, *, log_x: bool, smooth: bool) -> None:  # type: ignore[no-untyped-def]
    colour = LINES[(curve.colour - 1) % len(LINES)]
    steps, values = thin(curve.steps, curve.values, log_x=log_x)
    marker = "o" if len(steps) <= MAX_MARKED_POINTS else ""
    if smooth and len(steps) >= MIN_POINTS_TO_SMOOTH:
        axes.plot(steps, values, color=colour, linewidth=1, alpha=0.3)
        values, marker = running_mean(values, max(1, len(values) // SMOOTHING_FRACTION)), ""
    axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=3.5, solid_capstyle="round")


def _inline(svg: str, name: str, label: str) -> str:
    """Only the `<svg>` element: ids made unique, colours from the style sheet, size from the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#|url\(#', lambda match: f"{match[0]}{name}-", svg)
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
