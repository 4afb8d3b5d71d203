"""The page's part on 16-bit training: drawn of what a run has recorded, and absent where it has recorded nothing."""

import json
import re

import pytest

from dalle_ds import cli
from dalle_ds.reporting import gradient_plots, page
from dalle_ds.reporting.exponents import Exponents, Histogram
from dalle_ds.reporting.instruments import formats_table, instruments, per_cent
from dalle_ds.reporting.run_folder import read_run_folder

N_RESBLOCK = 6
WIDE = Histogram(first=-40, counts=[1, 5, 20, 30, 20, 5, 1], zeros=18, nonfinite=2)
NARROW = Histogram(first=-12, counts=[50, 50], zeros=0, nonfinite=0)


def write_run(folder, lines, histograms=()):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"kind": "prior", "version": "0.1.0", "config": {}}))
    for name, rows in (("metrics.jsonl", lines), ("histograms.jsonl", histograms)):
        if rows:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def training_lines(n=40):
    lines = []
    for i in range(1, n + 1):
        line = {"step": 10 * i, "kind": "train", "time": 1.0 * i, "loss": 5.0, "gradient_norm": 1.0}
        scales = [2.0 ** (13 + min(11, i * (block + 1) / 20)) for block in range(N_RESBLOCK)]
        events = [i // (block + 2) for block in range(N_RESBLOCK)]
        lines.append({**line, "gradient_scales": scales, "nonfinite_events": events, "skipped_updates": i // 2})
    lines.append({"step": 200, "kind": "halving", "time": 20.0, "by": "plateau", "multiplier": 0.5})
    return lines


def as_json(histogram):
    return None if histogram is None else vars(histogram)


def histogram_lines():
    kinds = {"attention matrices": as_json(WIDE), "gains": as_json(NARROW)}
    blocks = [as_json(WIDE), as_json(NARROW), None, as_json(WIDE), as_json(NARROW), None]
    return [
        {"step": step, "kind": "gradients", "time": 1.0, "kinds": kinds, "resblocks": blocks} for step in (100, 400)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "prior", training_lines(), histogram_lines())


def test_each_instrument_that_a_run_has_is_on_its_page_in_the_pages_colours(run):
    assert cli.run_command("report", [str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    for title in (
        "Sixteen bits",
        "Gradient scales",
        "second MLP (resblock 3)",
        "Non-finite gradients",
        "Skipped updates",
        "Gradients by resblock",
        "Gradients by kind",
        "Gradients of step 400 in 16-bit formats",
        "attention matrices",
    ):
        assert title in text, title
    shown = instruments(read_run_folder(run))
    assert len(shown) == 5
    for instrument in shown:
        assert "var(--line-" in instrument.svg, instrument.title
        assert not re.search(r"#[0-9a-f]{6}\b", instrument.svg), instrument.title
        assert re.search(r"\bnan\b", instrument.svg) is None, instrument.title
    assert [panel.title for panels in page.panels(read_run_folder(run)).values() for panel in panels] == [
        "Loss",
        "Gradient norm",
    ], "lists, and what is drawn here, are not drawn as scalars"


def test_ids_are_there_once(run):
    ids = re.findall(r'\bid="([^"]*)"', page.render(read_run_folder(run), None))
    assert len(ids) == len(set(ids))


def test_a_run_without_instruments_has_none_of_it(tmp_path):
    plain = [{"step": 10, "kind": "train", "time": 1.0, "loss": 5.0, "gradient_scales": [], "nonfinite_events": []}]
    run = read_run_folder(write_run(tmp_path / "run", plain))
    assert instruments(run) == []
    assert formats_table(run) is None
    assert "Sixteen bits" not in page.render(run, None)


def test_the_scales_of_every_resblock_are_lines_and_the_second_mlp_stands_out(run):
    steps, scales = read_run_folder(run).series("gradient_scales")
    assert (len(steps), len(scales[0])) == (40, N_RESBLOCK)
    svg = gradient_plots.scales_plot("s", steps, scales)
    lines = re.findall(r"<path [^>]*stroke: var\(--line-(\d)\)[^>]*stroke-width: ([\d.]+)", svg)
    assert sorted(colour for colour, _ in lines) == ["1", "1", "1", "2", "2", "3"]
    assert max(lines, key=lambda line: float(line[1]))[0] == "3"


def test_a_model_of_one_layer_has_no_second_mlp_and_is_drawn_all_the_same(tmp_path):
    line = {"step": 10, "kind": "train", "time": 1.0, "gradient_scales": [8192.0, 0.0], "nonfinite_events": [0, 0]}
    shown = instruments(read_run_folder(write_run(tmp_path / "run", [line])))
    assert [instrument.title for instrument in shown] == ["Gradient scales", "Non-finite gradients"]
    assert all(label != "second MLP (resblock 3)" for label, _ in shown[0].legend)


def test_gradients_of_nothing_but_zeros_are_drawn_all_the_same():
    zeros = Histogram(first=-149, counts=[0], zeros=7, nonfinite=0)
    exponents = Exponents(step=1, kinds={"gains": zeros}, resblocks=[zeros, None])
    assert gradient_plots.kinds_plot("k", exponents, exponents).startswith("<svg")
    assert gradient_plots.resblocks_plot("r", exponents).startswith("<svg")


def test_the_table_says_what_each_format_would_lose(run):
    table = formats_table(read_run_folder(run))
    assert table.step == 400
    rows = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    wide, narrow = rows["attention matrices"], rows["gains"]
    assert (wide["entries"], wide["zero"], wide["not finite"]) == ("102", "18%", "2")
    assert (wide["fp16: flushed"], wide["fp16: too large"], wide["bf16: flushed"]) == ("100%", "0", "0")
    assert wide["fp16: constants"] == "2^15 to 2^49"
    assert (narrow["fp16: flushed"], narrow["1-6-9: flushed"]) == ("0", "0")
    assert (per_cent(0.0), per_cent(1e-9), per_cent(0.12345)) == ("0", "< 0.01%", "12.3%")


def test_a_list_of_another_length_is_of_another_model_and_left_out(tmp_path):
    lines = [
        {"step": step, "kind": "train", "time": 1.0, "gradient_scales": scales}
        for step, scales in [(1, [1.0]), (2, [1.0, 2.0]), (3, ["x", 2.0]), (4, [3.0, 4.0])]
    ]
    run = read_run_folder(write_run(tmp_path / "run", lines))
    assert run.series("gradient_scales") == ([2.0, 4.0], [[1.0, 2.0], [3.0, 4.0]])
