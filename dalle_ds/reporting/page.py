"""One self-contained HTML page of a run: pictures, figures, curves, settings, versions; no link leaves it.

run_folder.py reads, plots.py draws, page.html lays out; this module chooses what is shown.
"""

import base64
import datetime
import importlib.metadata
import io
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dalle_ds
from dalle_ds.config import InputError
from dalle_ds.reporting.instruments import OWN_SCALARS, TABLE_NOTE, FormatsTable, Instrument, formats_table, instruments
from dalle_ds.reporting.plots import Curve, line_plot
from dalle_ds.reporting.run_folder import Example, Figure, Grid, RunFolder

MAX_EXAMPLES = 60
MAX_EARLIER_GRIDS = 4
MAX_HEADLINES = 4
MAX_PICTURE_SIDE = 2400  # pixels; a larger grid is shrunk, so that the page stays a few megabytes
FINAL_FRACTION = 20  # a final training loss is the mean over the last one part in so many of its lines
MINUTE, HOUR, DAY = 60, 3_600, 86_400
PACKAGES = ("dalle_ds", "torch", "deepspeed", "triton", "numpy")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A plot with its title, a note on what it means, and a legend of (label, colour)."""

    title: str
    note: str
    svg: str
    log_svg: str  # the same over a logarithmic step axis; empty where that is not offered
    legend: list[tuple[str, int]]


@dataclass(frozen=True, kw_only=True)
class ShownGrid:
    """A grid ready for the page."""

    title: str
    uri: str
    captions: list[str]


@dataclass(frozen=True, kw_only=True)
class ShownRun:
    """What a section about one run holds; the page has one for the run, and one for its dVAE."""

    folder: RunFolder
    cards: list[tuple[str, str, str]]
    newest: ShownGrid | None
    earlier: list[ShownGrid]
    panels: dict[str, list[Panel]]
    instruments: list[Instrument]
    formats: FormatsTable | None
    figures: list[tuple[Figure, str]]  # each with its 95% interval, if it has one
    evaluation_grids: list[ShownGrid]


def write_report(run: RunFolder, dvae: RunFolder | None, out: Path) -> None:
    """Writes the page of `run` to `out`, aside first and then in one move; `dvae` gets a section of its own."""
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: give a file name, e.g. {out / 'report.html'}")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: {out.parent} is no folder; make it first, or give another place")
    page = render(run, dvae)
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def render(run: RunFolder, dvae: RunFolder | None) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=format_figure, share=share)
    return environment.get_template("page.html").render(
        name=run.path.resolve().name,
        run=shown_run(run),
        dvae=shown_run(dvae) if dvae else None,
        headlines=run.figures[:MAX_HEADLINES],
        examples=shown_examples(run),
        n_examples=len(run.examples),
        settings=settings(run.config),
        ds_config=json.dumps(run.ds_config, indent=2) if run.ds_config else "",
        versions=versions(run),
        formats_note=TABLE_NOTE,
        written=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
    )


def shown_run(run: RunFolder) -> ShownRun:
    """Cards, grids and plots of one run."""
    newest, earlier = shown_grids(run)
    return ShownRun(
        folder=run,
        cards=cards(run),
        newest=newest,
        earlier=earlier,
        panels=panels(run),
        instruments=instruments(run),
        formats=formats_table(run),
        figures=[(figure, interval(figure)) for figure in run.figures],
        evaluation_grids=[shown for grid in run.evaluation_grids if (shown := _shown_grid(grid))],
    )


def cards(run: RunFolder) -> list[tuple[str, str, str]]:
    """(label, value, note) of the run at a glance."""
    shown = [("Kind", *KIND_NAMES[run.kind])]
    if run.n_parameters is not None:
        shown.append(("Parameters", format_count(run.n_parameters), f"{run.n_parameters:,}"))
    if run.metrics:
        wanted = run.config.get("loop", {}).get("steps")
        shown.append(("Steps", f"{run.last_step():,}", f"of {wanted:,}" if isinstance(wanted, int) else ""))
        shown.append(("Training time", format_duration(run.seconds()), ""))
    _, train = run.curve("loss")
    if train:
        last = train[-max(1, len(train) // FINAL_FRACTION) :]
        note = f"mean of the last {len(last)} lines" if len(last) > 1 else "last line"
        shown.append(("Training loss", format_number(sum(last) / len(last)), note))
    steps, validation = run.curve("loss", "validation")
    if validation:
        shown.append(("Validation loss", format_number(validation[-1]), f"at step {steps[-1]:,.0f}"))
    return shown


def shown_grids(run: RunFolder) -> tuple[ShownGrid | None, list[ShownGrid]]:
    """The newest grid that can be read, and earlier ones evenly spread over training, latest first."""
    if not run.grids:
        return None, []
    *earlier, newest = run.grids
    stepped = [grid for grid in earlier if grid.step is not None]
    chosen = stepped
    if len(stepped) > MAX_EARLIER_GRIDS:
        chosen = [stepped[round(i * (len(stepped) - 1) / (MAX_EARLIER_GRIDS - 1))] for i in range(MAX_EARLIER_GRIDS)]
    ready = [shown for grid in [*chosen, newest] if (shown := _shown_grid(grid))]
    return (ready[-1], ready[-2::-1]) if ready else (None, [])


def _shown_grid(grid: Grid) -> ShownGrid | None:
    uri = picture_uri(grid.path)
    title = grid.title or (f"step {grid.step:,}" if grid.step is not None else grid.path.stem)
    return ShownGrid(title=title, uri=uri, captions=grid.captions) if uri else None


def shown_examples(run: RunFolder) -> list[tuple[Example, str]]:
    """The first judged samples, in the order of the evaluation (so not the best ones), each with its picture."""
    return [(example, uri) for example in run.examples[:MAX_EXAMPLES] if (uri := picture_uri(example.path))]


def panels(run: RunFolder) -> dict[str, list[Panel]]:
    """A plot for every scalar of the metrics, by section; scalars that PANELS does not know go to "other"."""
    shown: dict[str, list[Panel]] = {}
    scalars = [name for name in run.scalars() if name not in OWN_SCALARS]
    for scalar in [*(name for name in PANELS if name in scalars), *(name for name in scalars if name not in PANELS)]:
        section, title, note = PANELS.get(scalar, ("other", scalar, ""))
        curves = []
        for colour, (kind, label) in enumerate(CURVE_NAMES.items(), 1):
            steps, values = run.curve(scalar, kind)
            if steps:
                curves.append(Curve(label=label, steps=steps, values=values, colour=colour))
        if not curves:
            continue
        name = f"{run.kind}-{len(shown.get(section, []))}-{section}"
        main = section == "loss"
        shown.setdefault(section, []).append(
            Panel(
                title=title,
                note=note,
                svg=line_plot(name, curves, wide=main, smooth=section != "schedules"),
                log_svg=line_plot(f"{name}-log", curves, wide=main, log_x=True, smooth=True) if main else "",
                legend=[(curve.label, curve.colour) for curve in curves],
            )
        )
    return shown


def picture_uri(path: Path) -> str:
    """The picture file as a data URI, shrunk when very large; empty when there is none or it does not decode."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        return ""
    try:
        with Image.open(path) as opened:
            opened.load()
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        return ""
    image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def interval(figure: Figure) -> str:
    """The 95% interval of a figure that has one."""
    if figure.low is None or figure.high is None:
        return ""
    return f"{100 * figure.low:.1f} to {100 * figure.high:.1f}%"


def settings(config: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Sections of the configuration, each with its (field, value) rows; fields outside any section come as "run"."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            sections[name] = [(field, _setting(inner)) for field, inner in value.items()]
        else:
            sections.setdefault("run", []).append((name, _setting(value)))
    return sections


def versions(run: RunFolder) -> dict[str, list[tuple[str, str]]]:
    """(what, version) by where it holds: as noted in the run's config.json, and on the machine that writes the page."""
    facts = {"dalle_ds" if name == "version" else name: value for name, value in run.about.items()}
    noted = [(name, _setting(value)) for name, value in facts.items() if not isinstance(value, dict)]
    for title, value in facts.items():
        if isinstance(value, dict):
            noted.extend((f"{title}: {name}", _setting(inner)) for name, inner in value.items())
    here = [("python", platform.python_version())]
    for package in PACKAGES:
        try:
            here.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            here.append((package, dalle_ds.__version__ if package == dalle_ds.__name__ else "not installed"))
    return {"Of the run": noted, "Of the machine that wrote this page": here}


def share(value: float) -> float:
    """A fraction as per cent of a meter's width, kept inside it."""
    return round(100 * min(max(value, 0.0), 1.0), 1)


def format_figure(value: float, figure: Figure) -> str:
    """A fraction that has a chance level reads as per cent, any other figure as a number."""
    return f"{100 * value:.1f}%" if figure.chance is not None and 0 <= figure.value <= 1 else format_number(value)


def format_number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def format_count(n: int) -> str:
    """1234567 reads 1.23 M."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return str(n)


def format_duration(seconds: float) -> str:
    if seconds < MINUTE:
        return f"{seconds:.0f} s"
    if seconds < HOUR:
        return f"{seconds // MINUTE:.0f} min {seconds % MINUTE:.0f} s"
    if seconds < DAY:
        return f"{seconds // HOUR:.0f} h {seconds % HOUR // MINUTE:.0f} min"
    return f"{seconds // DAY:.0f} d {seconds % DAY // HOUR:.0f} h"


def _setting(value: Any) -> str:
    if isinstance(value, str):
        return value or "(empty)"
    return json.dumps(value)


KIND_NAMES = {"dvae": ("dVAE", "stage 1: pictures to tokens"), "prior": ("Prior", "stage 2: captions to tokens")}
CURVE_NAMES = {"train": "training", "validation": "validation"}

# Scalar of metrics.jsonl -> section of the page, title, note. Order is the page's.
PANELS = {
    "loss": ("loss", "Loss", "what training minimises"),
    "reconstruction": ("parts", "Reconstruction", "how well the picture comes back; lower is better"),
    "kl": ("parts", "KL divergence", "of the codes from the uniform prior, unweighted"),
    "kl_per_cell": ("parts", "KL a cell", "nats; at most ln of the number of tokens"),
    "image_loss": ("parts", "Image token loss", "nats a token"),
    "text_loss": ("parts", "Text token loss", "nats a token"),
    "gradient_norm": ("parts", "Gradient norm", "before clipping"),
    "learning_rate": ("schedules", "Learning rate", ""),
    "kl_weight": ("schedules", "KL weight", ""),
    "temperature": ("schedules", "Gumbel-softmax temperature", ""),
    "codebook_use": ("codebook", "Codebook use", "share of the image tokens in use"),
    "codebook_perplexity": ("codebook", "Codebook perplexity", "how many tokens are in even use"),
    "images_per_second": ("throughput", "Pictures a second", "on all ranks together"),
    "tokens_per_second": ("throughput", "Tokens a second", "on all ranks together"),
}
