"""`dalle-ds evaluate --stage dvae`, as a user runs it: figures, tables, pictures, the report, and mistakes."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_here
from PIL import Image
from test_commands import make_picture
from test_reconstruction import make_dvae, write_dvae_run

from dalle_ds.cli import main
from dalle_ds.data.images import picture_decode
from dalle_ds.data.pipeline import Reader
from dalle_ds.data.sources import open_source
from dalle_ds.data.writer import ShardWriter
from dalle_ds.evaluation.lpips import Lpips
from dalle_ds.evaluation.reconstruction import psnr
from dalle_ds.reporting.grid import pairs_grid

N = 11


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run without metrics and a data set of pictures, one of which is broken, in two shards."""
    root = tmp_path_factory.mktemp("evaluate")
    write_dvae_run(root / "dvae", make_dvae())
    with ShardWriter(root / "data", samples_per_shard=6) as writer:
        for i in range(N):
            writer.write({"png": make_picture(i, "PNG"), "txt": f"picture {i}".encode()})
        writer.write({"png": b"broken", "txt": b"no picture"})
    torch.manual_seed(0)
    torch.save(Lpips().state_dict(), root / "lpips.pth")
    return root


def evaluate(place, *flags, run="dvae"):
    """Runs the command and returns evaluation.json, with its figures by name."""
    run_here("evaluate", "--stage", "dvae", "--dvae", place / run, "--data", place / "data", *flags)
    evaluation = json.loads((place / run / "evaluation.json").read_text())
    return evaluation, {row["name"]: row["value"] for row in evaluation["figures"]}


def test_the_figures_stand_on_the_terminal_in_evaluation_json_and_in_the_report(place, capsys):
    evaluation, figures = evaluate(place, "--lpips", place / "lpips.pth", "--temperature", 0.5, "--n_shown", 3)
    said = capsys.readouterr().out
    assert {row["n"] for row in evaluation["figures"]} == {N}
    assert list(figures)[:4] == ["PSNR (dB)", "SSIM", "LPIPS (AlexNet)", "codebook use"]
    assert [row["decoder"] for row in evaluation["bounds"]] == [
        "relaxed at 0.0625",  # the paper's: this run has neither metrics nor a schedule
        "relaxed at 0.5",
        "drawn",
        "likeliest",
    ]
    for words in (
        "PSNR (dB)",
        f"{figures['PSNR (dB)']:.4g}",
        "nats a dimension",
        "bits a dimension",
        "warning: left out 1",
    ):
        assert words in said
    assert "ELBO gap, relaxed at 0.0625 minus likeliest (bits a dimension)" in figures
    run_here("report", place / "dvae")
    page = (place / "dvae/report.html").read_text()
    for words in ("PSNR (dB)", "the worst of 11 pictures", "the median of 11 pictures", "relaxed at 0.5 (no bound)"):
        assert words in page
    assert "chance" not in page.partition("<main>")[2]
    prior = place / "prior"
    prior.mkdir()
    (prior / "config.json").write_text('{"kind": "prior", "version": "0", "config": {}}')
    run_here("report", prior, "--dvae", place / "dvae")
    section = (prior / "report.html").read_text().partition("The dVAE behind it")[2]
    assert "SSIM" in section
    assert "relaxed at 0.5 (no bound)" in section


def test_the_worst_and_the_median_pictures_are_those_by_psnr(place):
    evaluation, figures = evaluate(place, "--n_shown", 2)
    with Reader(open_source(str(place / "data")), picture_decode(32, augment=False), N, epochs=1) as reader:
        images = torch.from_numpy(next(reader)["image"]).permute(0, 3, 1, 2)
    dvae = make_dvae()
    values = psnr(images, dvae.decode(dvae.encode(images)))
    assert figures["PSNR (dB)"] == pytest.approx(float(values.mean()), rel=1e-6)
    order = values.argsort()
    for grid, places in zip(evaluation["grids"], (order[:2], order[4:6]), strict=True):
        low, high = (f"{float(values[i]):.1f}" for i in places)
        assert f"{low} to {high} dB" in grid["title"]
        originals = images[places]
        pair = [list(stack.permute(0, 2, 3, 1).numpy()) for stack in (originals, dvae.decode(dvae.encode(originals)))]
        expected = pairs_grid(*pair, scale=4)
        assert np.array_equal(np.asarray(Image.open(place / "dvae" / grid["file"])), np.asarray(expected))
    assert {path.name for path in (place / "dvae/evaluation").iterdir()} == {"worst.png", "median.png"}


def test_the_same_figures_come_each_time_whatever_the_batch_size_and_others_with_another_seed(place):
    once, again = (evaluate(place)[0] for _ in range(2))
    assert once == again
    figures = {row["name"]: row["value"] for row in once["figures"]}
    _, batched = evaluate(place, "--batch_size", 3)
    assert batched == pytest.approx(figures, rel=1e-5, abs=1e-7)  # convolutions of another size may round otherwise
    _, other = evaluate(place, "--seed", 1)
    assert other["SSIM"] == figures["SSIM"]
    assert other["ELBO, drawn (bits a dimension)"] != figures["ELBO, drawn (bits a dimension)"]


def test_n_takes_the_first_pictures_and_zero_takes_all(place):
    assert {row["n"] for row in evaluate(place, "--n", 4)[0]["figures"]} == {4}
    assert {row["n"] for row in evaluate(place, "--n", 0)[0]["figures"]} == {N}


def test_the_temperature_is_the_one_that_training_reached_or_was_to_reach(place):
    shutil.copytree(place / "dvae", place / "stopped")
    about = json.loads((place / "stopped/config.json").read_text())
    about["config"]["schedule"] = {"temperature_end": 0.125}
    (place / "stopped/config.json").write_text(json.dumps(about))
    assert evaluate(place, "--n", 2, run="stopped")[0]["bounds"][0]["decoder"] == "relaxed at 0.125"
    lines = [{"step": step, "kind": "train", "temperature": t} for step, t in ((10, 0.9), (20, 0.7))]
    (place / "stopped/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate(place, "--n", 2, run="stopped")[0]["bounds"][0]["decoder"] == "relaxed at 0.7"
    checkpoint = "stopped/checkpoints/step-00000001"
    assert evaluate(place, "--n", 2, run=checkpoint)[0]["bounds"][0]["decoder"] == "relaxed at 0.7"


DVAE_STAGE = ["--stage", "dvae", "--dvae", "{place}/dvae", "--data", "{place}/data"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "{place}/data"], "--prior is missing: give the run folder of a prior"),
        (["--prior", "x", "--data", "x", "--lpips", "x"], "--lpips says nothing with --stage prior"),
        (["--stage", "dvae", "--data", "{place}/data"], "--dvae is missing: give the run folder"),
        ([*DVAE_STAGE, "--prior", "x"], "--prior says nothing with --stage dvae"),
        ([*DVAE_STAGE, "--top_k", "3"], "--top_k says nothing with --stage dvae"),
        ([*DVAE_STAGE, "--temperature", "0"], "--temperature 0.0 must be positive"),
        ([*DVAE_STAGE, "--n", "-1"], "--n -1 must not be negative"),
        ([*DVAE_STAGE, "--lpips", "{place}/data/00000.tar"], "00000.tar: holds no tensors by name"),
        ([*DVAE_STAGE, "--dvae", "{place}/data"], "data is no run folder"),
        ([*DVAE_STAGE, "--data", "{place}/nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(place, capsys, flags, said):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert main(["evaluate", *(flag.format(place=place) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dalle-ds evaluate: error: ")
    assert error.count("\n") == 1
    assert said in error
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
