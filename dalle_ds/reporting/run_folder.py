"""Reads a run folder as it lies on disk, finished or still training; nothing here writes.

Whatever is missing is empty or None, so that a page can be made at any time. Only a folder without a
usable config.json is refused: it is no run folder.
"""

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_ds.config import InputError
from dalle_ds.reporting.exponents import Exponents, read_exponents

KINDS = ("dvae", "prior")
Scalars = dict[str, float | str | list[float]]
STEP_NAME = re.compile(r"step-(\d+)$")
SAFETENSORS_LENGTH_BYTES = 8
BOUND_TERMS = ("reconstruction_bits", "kl_bits", "elbo_bits", "bytes_bits", "kl_nats_per_cell")
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes: the format's own bound


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A picture grid of the run; `step` is None for one that was not drawn while training."""

    path: Path
    step: int | None
    captions: list[str]
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured figure of evaluation.json.

    `low` and `high` bound its 95% interval, `chance` is what guessing would give, `n` the number of pictures.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    chance: float | None
    n: int | None


@dataclass(frozen=True, kw_only=True)
class Example:
    """One judged sample of evaluation.json."""

    caption: str
    path: Path
    right: bool
    read: str
    truth: str


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """All that a report shows of a run."""

    path: Path
    kind: str
    config: dict[str, Any]
    about: dict[str, Any]  # the rest of config.json: version, versions, machine, ...
    ds_config: dict[str, Any] | None
    metrics: list[Scalars]
    n_bad_lines: int
    exponents: list[Exponents]
    grids: list[Grid]
    has_evaluation: bool
    figures: list[Figure]
    examples: list[Example]
    bounds: list[dict[str, Any]]  # of a dVAE: a row of terms for each decoder, as evaluation/reconstruction.py says
    evaluation_grids: list[Grid]
    n_parameters: int | None

    def curve(self, name: str, kind: str = "train") -> tuple[list[float], list[float]]:
        """Steps and values of the scalar `name` in lines of `kind`; of a step written twice the later line counts."""
        points: dict[float, float] = {}
        for line in self.metrics:
            value = line.get(name)
            if line["kind"] == kind and isinstance(value, float) and math.isfinite(value):
                points[_step(line)] = value
        steps = sorted(points)
        return steps, [points[step] for step in steps]

    def series(self, name: str) -> tuple[list[float], list[list[float]]]:
        """Steps and values of the list `name` in training lines, of which only those as long as the last one."""
        points: dict[float, list[float]] = {}
        for line in self.metrics:
            values = line.get(name)
            if line["kind"] == "train" and isinstance(values, list) and values:
                points[_step(line)] = values
        steps = [step for step in sorted(points) if len(points[step]) == len(points[max(points)])]
        return steps, [points[step] for step in steps]

    def scalars(self) -> list[str]:
        """Names of all scalars in the metrics, in order of appearance."""
        names = dict.fromkeys(name for line in self.metrics for name in line if not isinstance(line[name], list))
        return [name for name in names if name not in ("step", "kind", "time")]

    def last_step(self) -> int:
        return max((int(_step(line)) for line in self.metrics), default=0)

    def seconds(self) -> float:
        """Seconds of training; a resumed run starts its clock again, so the stretches are added up."""
        total, last = 0.0, 0.0
        for line in self.metrics:
            time = line.get("time")
            if isinstance(time, float) and math.isfinite(time):
                total += last if time < last else 0.0
                last = time
        return total + last


def read_run_folder(path: Path, kind: str | None = None) -> RunFolder:
    """Reads the run folder at `path`.

    Raises InputError when it is none, or is not of `kind`.
    """
    about = _read_config(path)
    if kind is not None and about["kind"] != kind:
        raise InputError(f"{path} is a {about['kind']} run, not a {kind} run: give the folder of a {kind} run")
    metrics, n_bad_lines = _read_metrics(path / "metrics.jsonl")
    evaluation = _read_json(path / "evaluation.json")
    return RunFolder(
        path=path,
        kind=about["kind"],
        config=about.get("config") or {},
        about={name: value for name, value in about.items() if name not in ("kind", "config")},
        ds_config=_read_json(path / "ds_config.json"),
        metrics=metrics,
        n_bad_lines=n_bad_lines,
        exponents=read_exponents(path / "histograms.jsonl"),
        grids=_read_grids(path / "samples"),
        has_evaluation=evaluation is not None,
        figures=_read_figures(evaluation or {}),
        examples=_read_examples(evaluation or {}, path),
        bounds=_read_bounds(evaluation or {}),
        evaluation_grids=[
            Grid(path=path / str(grid["file"]), step=None, captions=[], title=str(grid.get("title", "")))
            for grid in _list_of_objects((evaluation or {}).get("grids"))
            if "file" in grid
        ],
        n_parameters=_count_parameters(path, about),
    )


def _read_config(path: Path) -> dict[str, Any]:
    remedy = "give the folder that train-dvae or train-prior wrote"
    if not path.is_dir():
        raise InputError(
            f"{path} is no run folder: {'it is a file' if path.exists() else 'nothing is there'}; {remedy}"
        )
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is no run folder: it has no config.json; {remedy}")
    about = _read_json(path / "config.json")
    if about is None or about.get("kind") not in KINDS:
        raise InputError(
            f"{path / 'config.json'} is not the config of a run: its 'kind' is not one of {', '.join(KINDS)}; {remedy}"
        )
    return about


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in the JSON file, or None when the file is missing or holds no object."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _read_metrics(path: Path) -> tuple[list[Scalars], int]:
    """The lines of metrics.jsonl, numbers as floats, and how many could not be read (a running job's last one, say)."""
    lines: list[Scalars] = []
    n_bad = 0
    if not path.is_file():
        return lines, n_bad
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            n_bad += 1
            continue
        if not isinstance(line, dict) or not _is_number(line.get("step")) or not isinstance(line.get("kind"), str):
            n_bad += 1
            continue
        scalars: Scalars = {name: float(value) for name, value in line.items() if _is_number(value)}
        for name, value in line.items():
            if isinstance(value, list) and all(map(_is_number, value)):
                scalars[name] = [float(number) for number in value]
        lines.append({**scalars, "kind": line["kind"]})
    return lines, n_bad


def _step(line: Scalars) -> float:
    step = line["step"]
    assert isinstance(step, float)
    return step


def _read_grids(folder: Path) -> list[Grid]:
    """The grids of `folder`, oldest step first; those without a step in their name come last."""
    grids = []
    for path in folder.glob("*.png") if folder.is_dir() else ():
        match = STEP_NAME.search(path.stem)
        captions = (_read_json(path.with_suffix(".json")) or {}).get("captions", [])
        grids.append(
            Grid(
                path=path,
                step=int(match[1]) if match else None,
                captions=[str(caption) for caption in captions] if isinstance(captions, list) else [],
            )
        )
    return sorted(grids, key=lambda grid: (math.inf if grid.step is None else grid.step, grid.path.name))


def _read_figures(evaluation: dict[str, Any]) -> list[Figure]:
    return [
        Figure(
            name=str(figure["name"]),
            value=float(figure["value"]),
            low=_number(figure, "low"),
            high=_number(figure, "high"),
            chance=_number(figure, "chance"),
            n=int(figure["n"]) if _is_number(figure.get("n")) else None,
        )
        for figure in _list_of_objects(evaluation.get("figures"))
        if "name" in figure and _is_number(figure.get("value"))
    ]


def _read_examples(evaluation: dict[str, Any], run: Path) -> list[Example]:
    return [
        Example(
            caption=str(example.get("caption", "")),
            path=run / str(example["file"]),
            right=bool(example.get("right")),
            read=str(example.get("read") or "nothing"),
            truth=str(example.get("truth") or ""),
        )
        for example in _list_of_objects(evaluation.get("examples"))
        if "file" in example
    ]


def _read_bounds(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    rows = _list_of_objects(evaluation.get("bounds"))
    return [row for row in rows if "decoder" in row and all(_is_number(row.get(term)) for term in BOUND_TERMS)]


def _list_of_objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _count_parameters(run: Path, about: dict[str, Any]) -> int | None:
    """From config.json where it says so, else from the header of the newest complete checkpoint; None without one."""
    if _is_number(about.get("n_parameters")):
        return int(about["n_parameters"])
    checkpoints = [path for path in run.glob("checkpoints/step-*") if (path / "complete.json").is_file()]
    weights = [path / "model.safetensors" for path in sorted(checkpoints, key=lambda path: path.name)]
    return _count_elements(weights[-1]) if weights and weights[-1].is_file() else None


def _count_elements(path: Path) -> int | None:
    """Elements of all tensors in a safetensors file: a length, then a JSON header with every shape."""
    with path.open("rb") as file:
        prefix = file.read(SAFETENSORS_LENGTH_BYTES)
        if len(prefix) < SAFETENSORS_LENGTH_BYTES:
            return None
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_SAFETENSORS_HEADER:
            return None
        try:
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
        except ValueError:
            return None
    shapes: list[list[int]] = [tensor["shape"] for name, tensor in header.items() if name != "__metadata__"]
    return sum(math.prod(shape) for shape in shapes)


def _number(figure: dict[str, Any], name: str) -> float | None:
    return float(figure[name]) if _is_number(figure.get(name)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
