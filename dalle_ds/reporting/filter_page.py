"""What `dalle-ds filter` tells of its work: report.json, and one self-contained HTML page with examples.

Neither holds a time, so that the same data and settings make the same report.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dalle_ds

REPORT_JSON, REPORT_PAGE = "report.json", "report.html"
MAX_REASONS = 50  # rows of the table of what could not be read


@dataclass(kw_only=True)
class Dropped:
    """A sample that a filter dropped; `picture`, and `twin` that it resembles, are data URIs or empty."""

    key: str
    origin: str
    caption: str
    reason: str
    picture: str = ""
    twin: str = ""


@dataclass(kw_only=True)
class FilterRow:
    """A filter, how many it dropped, and the first few."""

    name: str
    summary: str
    dropped: int
    examples: list[Dropped] = field(default_factory=list)


@dataclass(kw_only=True)
class FilterReport:
    """All that the report says. `read` counts samples that reached the filters; `unreadable` those, and shards, not."""

    data: str
    settings: dict[str, Any]
    read: int
    kept: int
    shards: int
    filters: list[FilterRow]
    unreadable: int
    unreadable_reasons: dict[str, int]


def write_filter_report(folder: Path, report: FilterReport) -> None:
    """Writes report.html, then report.json, into `folder`."""
    # Names of files need not be UTF-8.
    (folder / REPORT_PAGE).write_text(render(report), encoding="utf-8", errors="backslashreplace")
    (folder / REPORT_JSON).write_text(json.dumps(as_json(report), indent=2) + "\n", encoding="utf-8")


def as_json(report: FilterReport) -> dict[str, Any]:
    """The report as JSON values, without its pictures."""
    values = {"version": dalle_ds.__version__, **dataclasses.asdict(report)}
    for row in values["filters"]:
        for example in row["examples"]:
            del example["picture"], example["twin"]
    return values


def render(report: FilterReport) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count="{:,}".format, of=share, width=width)
    reasons = dict(sorted(report.unreadable_reasons.items(), key=lambda item: -item[1])[:MAX_REASONS])
    shown = dataclasses.replace(report, unreadable_reasons=reasons)
    return environment.get_template("filter_page.html").render(
        report=shown, cards=cards(report), version=dalle_ds.__version__
    )


def cards(report: FilterReport) -> list[tuple[str, str, str]]:
    """(label, value, note) of the report at a glance."""
    dropped = report.read - report.kept
    return [
        ("Samples read", f"{report.read:,}", "with a picture and a caption"),
        ("Kept", f"{report.kept:,}", f"{share(report.kept, report.read)}; shards written: {report.shards:,}"),
        ("Dropped", f"{dropped:,}", f"{share(dropped, report.read)} by the filters below"),
        ("Not readable", f"{report.unreadable:,}", "samples and shards"),
    ]


def share(n: int, total: int) -> str:
    return f"{100 * n / total:.1f}%" if total else "0%"


def width(n: int, total: int) -> float:
    """Per cent of a bar."""
    return round(100 * n / total, 2) if total else 0.0
