"""The part of the page about 16-bit training: scales, events, exponents, and what formats would make of them.

A run without these instruments has none of it.
"""

from dataclasses import dataclass

from dalle_ds.reporting.exponents import FORMATS, FP16, TOLERABLE, Exponents, Histogram
from dalle_ds.reporting.gradient_plots import SECOND_MLP, events_plot, kinds_plot, resblocks_plot, scales_plot
from dalle_ds.reporting.plots import Curve, line_plot
from dalle_ds.reporting.run_folder import RunFolder

# Scalars of metrics.jsonl that are drawn here and not among the others.
OWN_SCALARS = ("skipped_updates",)
HALVES = [("attention", 1), ("MLP", 2)]
LEAST_SHARE = 1e-4  # shown as a number; what is less, as less than that


@dataclass(frozen=True, kw_only=True)
class Instrument:
    """A plot with its title, a note on what it means, and a legend of (label, colour); `wide` takes the whole line."""

    title: str
    note: str
    svg: str
    legend: list[tuple[str, int]]
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class FormatsTable:
    """What 16-bit formats would make of the gradients of a step: a row for each kind of parameter."""

    step: int
    head: list[str]
    rows: list[list[str]]


def instruments(run: RunFolder) -> list[Instrument]:
    """The plots that the run has data for."""
    shown = []
    steps, scales = run.series("gradient_scales")
    if scales:
        second = [(f"second MLP (resblock {SECOND_MLP})", 3)] if len(scales[0]) > SECOND_MLP else []
        note = "what each resblock's gradients are multiplied by; Figure 12 of the paper"
        svg = scales_plot(f"{run.kind}-scales", steps, scales)
        shown.append(Instrument(title="Gradient scales", note=note, svg=svg, legend=[*HALVES, *second], wide=True))
    _, events = run.series("nonfinite_events")
    if events:
        note = f"updates that found some, by resblock; {sum(events[-1]):,.0f} in all"
        svg = events_plot(f"{run.kind}-events", events[-1])
        shown.append(Instrument(title="Non-finite gradients", note=note, svg=svg, legend=HALVES))
    steps, skipped = run.curve("skipped_updates")
    if skipped:
        curve = Curve(label="skipped updates", steps=steps, values=skipped)
        note = "so far, for gradients that were not finite"
        svg = line_plot(f"{run.kind}-skipped", [curve], counts=True)
        shown.append(Instrument(title="Skipped updates", note=note, svg=svg, legend=[]))
    if run.exponents:
        shown.extend(_exponents(run.kind, run.exponents[0], run.exponents[-1]))
    return shown


def _exponents(kind: str, first: Exponents, last: Exponents) -> list[Instrument]:
    shown = []
    if any(last.resblocks):
        note = f"log2 of the entries, median and middle nine tenths, at step {last.step:,}"
        svg = resblocks_plot(f"{kind}-resblock-exponents", last)
        title = "Gradients by resblock"
        shown.append(Instrument(title=title, note=note, svg=svg, legend=HALVES, wide=True))
    if last.kinds:
        note = f"share of the entries by size; to the left of 2^{FP16.smallest - 1} (grey) fp16 has only 0"
        legend = [(f"step {last.step:,}", 1), *([(f"step {first.step:,}", 2)] if first.step != last.step else [])]
        svg = kinds_plot(f"{kind}-exponents", first, last)
        shown.append(Instrument(title="Gradients by kind", note=note, svg=svg, legend=legend, wide=True))
    return shown


def formats_table(run: RunFolder) -> FormatsTable | None:
    """What each format would flush to zero and overflow at, unscaled; and by which powers of two fp16 holds them."""
    if not run.exponents or not run.exponents[-1].kinds:
        return None
    last = run.exponents[-1]
    names = [f"{format.name}: {what}" for format in FORMATS for what in ("flushed", "too large")]
    head = ["kind", "entries", "zero", "not finite", *names, f"{FP16.name}: constants"]
    return FormatsTable(step=last.step, head=head, rows=[_row(kind, h) for kind, h in last.kinds.items()])


def _row(kind: str, histogram: Histogram) -> list[str]:
    shares = [share for f in FORMATS for share in (histogram.flushed(f), histogram.overflowing(f))]
    constants = histogram.constants(FP16)
    return [
        kind,
        f"{histogram.n_entry + histogram.nonfinite:,}",
        per_cent(histogram.zeros / max(1, histogram.n_entry)),
        f"{histogram.nonfinite:,}",
        *(per_cent(share) for share in shares),
        "none" if constants is None else f"2^{constants[0]} to 2^{constants[1]}",
    ]


def per_cent(share: float) -> str:
    """A share as per cent; nothing for none at all."""
    if share == 0:
        return "0"
    return f"< {100 * LEAST_SHARE:g}%" if share < LEAST_SHARE else f"{100 * share:.3g}%"


TABLE_NOTE = (
    "Flushed and too large: shares of the entries other than 0, as they are, without any scale. Constants: powers "
    f"of two by which fp16 loses at most {100 * TOLERABLE:g}% to zero, none to infinity; a sum over ranks needs room."
)
