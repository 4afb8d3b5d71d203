"""The report: all that is in a run folder is on the page, what is missing is named, and no link leaves the page."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dalle_ds import cli
from dalle_ds.reporting import page
from dalle_ds.reporting.grid import make_grid, pairs_grid
from dalle_ds.reporting.plots import Curve, line_plot, running_mean, thin
from dalle_ds.reporting.run_folder import Figure, read_run_folder

SIDE = 32
VOID = {"meta", "img", "input", "br", "link"}


def noise(seed, side=SIDE):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder, kind, n_line=80):
    """A run folder as training writes it, with every part there is."""
    (folder / "samples").mkdir(parents=True)
    model = {"image_size": 64, "vocab_size": 512} if kind == "dvae" else {"n_layer": 6, "text_len": 32}
    about = {"kind": kind, "version": "0.1.0", "versions": {"torch": "2.13.0"}}
    (folder / "config.json").write_text(json.dumps({**about, "config": {"model": model, "loop": {"steps": 800}}}))
    (folder / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    parts = ("reconstruction", "kl", "kl_weight", "temperature", "codebook_use", "codebook_perplexity")
    scalars = parts if kind == "dvae" else ("image_loss", "text_loss")
    lines = []
    for i in range(1, n_line + 1):
        value = 2 + 6 * math.exp(-i / 20)
        line = {"step": 10 * i, "kind": "train", "time": 1.5 * i, "loss": value, "images_per_second": 100.0}
        lines.append(
            {**line, "learning_rate": 1e-3 * (1 - i / n_line), "batch_noise": 1.0, **dict.fromkeys(scalars, value)}
        )
        if i % 20 == 0:
            lines.append({"step": 10 * i, "kind": "validation", "time": 1.5 * i, "loss": value + 0.1})
    write_lines(folder / "metrics.jsonl", lines)
    for step in (200, 400, 800):
        pictures = [noise(step + i) for i in range(4)]
        captions = [f"caption {i} at {step}" for i in range(4)]
        grid = pairs_grid(pictures, pictures) if kind == "dvae" else make_grid(pictures, captions)
        grid.save(folder / "samples" / f"step-{step:08d}.png")
        (folder / "samples" / f"step-{step:08d}.json").write_text(json.dumps({"captions": captions}))
    checkpoint = folder / "checkpoints" / "step-00000800"
    checkpoint.mkdir(parents=True)
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(1000, 1234)}, checkpoint / "model.safetensors")
    (checkpoint / "complete.json").write_text("{}")
    return folder


def add_evaluation(folder, captions=("a red circle", "a blue star")):
    (folder / "evaluation").mkdir()
    examples = []
    for i, caption in enumerate(captions):
        Image.fromarray(noise(i)).save(folder / "evaluation" / f"{i}.png")
        example = {
            "caption": caption,
            "file": f"evaluation/{i}.png",
            "right": i % 2 == 0,
            "read": "red circle, top left",
        }
        examples.append({**example, "truth": "red circle, centre"})
    figures = [
        {"name": "caption accuracy", "value": 0.842, "low": 0.818, "high": 0.863, "chance": 0.031, "n": 1000},
        {"name": "shape", "value": 0.95, "chance": 0.17, "n": 1000},
        {"name": "FID", "value": 23.4567},
    ]
    (folder / "evaluation.json").write_text(json.dumps({"figures": figures, "examples": examples}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "dvae", "dvae")
    add_evaluation(make_run(root / "prior", "prior"))
    return root


@pytest.fixture(scope="module")
def full_page(runs):
    assert cli.run_command("report", [str(runs / "prior"), "--dvae", str(runs / "dvae")]) == 0
    return (runs / "prior" / "report.html").read_text(encoding="utf-8")


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in its place, and gathers ids."""

    def __init__(self):
        super().__init__()
        self.open, self.ids = [], []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_no_link_leaves_the_page(full_page):
    assert not re.search(r"https?://|@import|<script|<link|<iframe", full_page)
    links = re.findall(r'(?:href|src)="([^"]*)"', full_page)
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_tags_are_balanced_and_every_id_is_there_once_for_every_reference(full_page):
    parser = Balanced()
    parser.feed(full_page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    references = re.findall(r'(?:href="#|url\(#|for=")([^")]+)', full_page)
    assert set(references) <= set(parser.ids)


def test_cards_show_kind_parameters_steps_time_and_losses(runs):
    shown = {label: value for label, value, _ in page.cards(read_run_folder(runs / "prior"))}
    assert shown["Kind"] == "Prior"
    assert shown["Parameters"] == "1.23 M"
    assert shown["Steps"] == "800"
    assert shown["Training time"] == "2 min 0 s"
    assert float(shown["Training loss"]) == pytest.approx(2 + 6 * math.exp(-78.5 / 20), abs=0.01)
    assert float(shown["Validation loss"]) == pytest.approx(2.1 + 6 * math.exp(-4), abs=0.001)


def test_figures_stand_beside_their_chance_level(full_page):
    for text in ("caption accuracy", "84.2%", "chance 3.1%", "1,000 pictures", "23.46", "81.8 to 86.3%"):
        assert text in full_page


def test_examples_carry_caption_mark_and_what_was_read(full_page):
    assert full_page.count("✓ right") == 1
    assert full_page.count("✗ wrong") == 1
    assert "reads red circle, top left" in full_page
    assert "asked for red circle, centre" in full_page


def test_the_dvae_has_a_section_with_its_own_curves_and_reconstructions(full_page):
    for text in ("The dVAE behind it", "Originals and reconstructions", "KL weight", "Codebook perplexity"):
        assert text in full_page
    assert "Give its run folder" not in full_page


def test_settings_and_versions_are_shown(full_page):
    for text in ("n_layer", "zero_optimization", "versions: torch", "2.13.0", "python", "deepspeed"):
        assert text in full_page


def test_a_scalar_that_no_table_knows_is_drawn_too(runs):
    shown = page.panels(read_run_folder(runs / "prior"))
    assert [panel.title for panel in shown["other"]] == ["batch_noise"]


def test_what_a_caption_says_is_text_and_never_markup(tmp_path):
    run = make_run(tmp_path / "run", "prior")
    hostile = '<img src="https://example.org/x.png" onerror="alert(1)">'
    add_evaluation(run, captions=[hostile])
    assert cli.run_command("report", [str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "&lt;img src=" in text
    assert hostile not in text


@pytest.mark.parametrize("kind", ["dvae", "prior"])
def test_a_run_that_has_only_begun_gets_a_page_that_says_what_to_run(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"kind": kind, "version": "0.1.0", "config": {}}))
    assert cli.run_command("report", [str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No curves yet" in text
    assert f"dalle-ds train-{kind}" in text
    assert "No <code>ds_config.json</code> here" in text
    assert ("dalle-ds evaluate" in text) == (kind == "prior")
    assert ("--dvae RUN_DVAE" in text) == (kind == "prior")


def test_a_half_written_last_line_and_a_broken_picture_are_left_out_and_the_rest_is_shown(tmp_path):
    run = make_run(tmp_path / "run", "dvae")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 810, "kind": "tr')
    newest = run / "samples" / "step-00000800.png"
    newest.write_bytes(newest.read_bytes()[:200])
    assert cli.run_command("report", [str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "1 line of <code>metrics.jsonl</code> could not be read and is left out" in text
    assert "<figcaption>step 400</figcaption>" in text
    assert "<figcaption>step 800</figcaption>" not in text


def test_not_a_number_is_no_point_of_a_curve_and_a_resumed_clock_is_added_up(tmp_path):
    (tmp_path / "config.json").write_text('{"kind": "prior", "version": "0.1.0", "config": {}}')
    times = [(1, 5.0, 3.0), (2, 9.0, math.nan), (3, 2.0, 2.0), (3, 4.0, 1.5)]
    write_lines(
        tmp_path / "metrics.jsonl",
        [{"step": step, "kind": "train", "time": time, "loss": loss} for step, time, loss in times],
    )
    run = read_run_folder(tmp_path)
    assert run.curve("loss") == ([1.0, 3.0], [3.0, 1.5])
    assert run.seconds() == 13.0


def test_other_folders_are_refused_in_one_line_with_the_remedy(tmp_path, runs, capsys):
    (tmp_path / "config.json").write_text('{"kind": "cake"}')
    for arguments, words in [
        ([tmp_path / "nowhere"], "nothing is there; give the folder"),
        ([runs], "it has no config.json; give the folder"),
        ([tmp_path], "'kind' is not one of dvae, prior"),
        ([runs / "prior", "--dvae", runs / "prior"], "is a prior run, not a dvae run"),
        ([runs / "dvae", "--out", tmp_path], "is a folder: give a file name"),
        ([runs / "dvae", "--out", tmp_path / "no" / "page.html"], "is no folder; make it first"),
    ]:
        assert cli.run_command("report", [str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_a_page_that_cannot_be_put_in_place_leaves_nothing_half_written(tmp_path, runs, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    assert cli.run_command("report", [str(runs / "dvae"), "--out", str(tmp_path / "page.html")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_figure_without_an_interval_shows_none():
    figure = Figure(name="x", value=0.5, low=0.2, high=0.8, chance=0.1, n=10)
    assert page.interval(figure) == "20.0 to 80.0%"
    assert page.interval(dataclasses.replace(figure, low=None)) == ""


def test_thinned_curves_keep_their_mean_and_order_and_a_logarithm_leaves_step_zero_out():
    steps = list(range(10_000))
    thinned, values = thin(steps, [2.0 * step for step in steps], n=100)
    assert len(thinned) <= 101
    assert thinned == sorted(thinned)
    assert values == pytest.approx([2 * step for step in thinned])
    assert thin([0, 1, 10], [5.0, 6.0, 7.0], log_x=True) == ([1, 10], [6.0, 7.0])
    assert running_mean([1.0, 2.0, 6.0], 5) == [1.0, 3.0, 6.0]


def test_a_plot_takes_all_its_colours_from_the_page():
    svg = line_plot("p", [Curve(label="loss", steps=[1, 2, 3], values=[3.0, 2.0, 1.0], colour=2)])
    assert svg.startswith("<svg")
    assert "var(--line-2)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
