"""The commands one after the other, at the smallest scale: in process, by `python`, and by the deepspeed launcher."""

import io
import json
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import GRID_SIZE, N_PIECES, N_TRAIN, VOCAB_SIZE, run_here, run_in_ranks
from helpers import read_weights
from PIL import Image
from programs import ROOT, assert_same_weights, environment, launcher, read_json, read_lines, start

from dalle_ds.data.sources import open_source
from dalle_ds.tokenizer import Tokenizer

# --- the chain --------------------------------------------------------------------------------------------------------


def test_each_command_leaves_what_the_next_one_needs(chain):
    assert Tokenizer.load(chain / "tokenizer.model").vocab_size == N_PIECES
    manifest = read_json(chain / "tokens/train/manifest.json")
    assert (manifest["n_samples"], manifest["grid_size"], manifest["vocab_size"]) == (N_TRAIN, GRID_SIZE, VOCAB_SIZE)
    assert not list((chain / "tokens").rglob(".*"))
    for kind in ("dvae", "prior"):
        run = chain / kind
        description = read_json(run / "config.json")
        assert description["kind"] == kind
        assert description["world_size"] == 1
        assert description["n_parameters"] == sum(tensor.numel() for tensor in read_weights(run).values())
        assert [line["step"] for line in read_lines(run, "train")] == [1, 2, 3]
        assert [line["step"] for line in read_lines(run, "validation")] == [3]
        assert Image.open(run / "samples/step-00000003.png").size[0] > 100
    assert read_json(chain / "dvae/ds_config.json")["zero_optimization"]["stage"] == 0
    assert len(read_json(chain / "prior/samples/step-00000003.json")["captions"]) == 12


def test_the_prior_takes_its_vocabularies_and_grid_from_tokenizer_and_token_shards(chain):
    model = read_json(chain / "prior/config.json")["config"]["model"]
    assert model["text_vocab_size"] == N_PIECES
    assert (model["image_vocab_size"], model["grid_size"]) == (VOCAB_SIZE, GRID_SIZE)


def test_sampling_writes_pictures_a_grid_and_their_captions_and_repeats_itself(chain, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("a blue star\n\na green disc\n")
    for name in ("once", "again"):
        arguments = ["--prior", chain / "prior", "--out", tmp_path / name, "--captions", captions, "--n", 2]
        run_here("sample", "a red circle", *arguments)
    once, again = tmp_path / "once", tmp_path / "again"
    listing = read_json(once / "captions.json")
    expected = [caption for caption in ("a red circle", "a blue star", "a green disc") for _ in range(2)]
    assert [entry["caption"] for entry in listing] == expected
    assert {path.name for path in once.iterdir()} == {entry["file"] for entry in listing} | {
        "grid.png",
        "captions.json",
    }
    for entry in listing:
        assert Image.open(once / entry["file"]).size == (32, 32)
        assert (once / entry["file"]).read_bytes() == (again / entry["file"]).read_bytes()
    assert (
        np.asarray(Image.open(once / "000-00.png")).tobytes() != np.asarray(Image.open(once / "000-01.png")).tobytes()
    )


def test_an_evaluation_stands_beside_chance_and_the_report_shows_it(chain):
    run_here("evaluate", "--prior", chain / "prior", "--data", chain / "scenes/held_out", "--n", 10, "--n_shown", 3)
    evaluation = read_json(chain / "prior/evaluation.json")
    figures = {row["name"]: row for row in evaluation["figures"]}
    figure = figures["caption accuracy: all"]
    assert 0 <= figure["value"] <= 1
    assert 0 <= figure["chance"] < 0.5
    assert figure["n"] == 10
    assert "dVAE reconstruction: all" in figures
    assert len(evaluation["examples"]) == 3
    for example in evaluation["examples"]:
        assert (chain / "prior" / example["file"]).is_file()
    run_here("report", chain / "prior", "--dvae", chain / "dvae")
    page = (chain / "prior/report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "caption accuracy" in page
    assert "data:image/png;base64," in page


def test_encoding_again_needs_overwrite_and_then_makes_the_same_bytes(chain, tmp_path):
    arguments = ["--dvae", chain / "dvae", "--data", chain / "scenes/validation", "--out", tmp_path / "tokens"]
    run_here("encode-images", *arguments, "--augment")
    run_here("encode-images", *arguments, "--overwrite")
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == ["00000.tar", "encoding", "manifest.json"]
    shard = (tmp_path / "tokens/00000.tar").read_bytes()
    assert shard == (chain / "tokens/validation/00000.tar").read_bytes()


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_prior_that_goes_on_ends_with_the_weights_of_an_unbroken_run(chain, tmp_path, world_size):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    outputs = run_in_ranks(
        world_size,
        chain.train_prior(whole, "--loop.steps", "5"),
        chain.train_prior(broken, "--loop.steps", "2"),
        chain.train_prior(broken, "--loop.steps", "5", "--resume", "auto"),
        chain.train_prior(broken, "--loop.steps", "5", "--resume", "auto"),
    )
    assert "steps 3 to 5" in outputs[2][0]
    assert "nothing to do, 5 steps are done" in outputs[3][0]
    lines = read_lines(broken, "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines] == [line["loss"] for line in read_lines(whole, "train")]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert read_json(broken / "config.json")["world_size"] == world_size
    assert_same_weights(whole, broken)


@pytest.mark.slow
def test_a_change_that_is_allowed_is_told_of_and_belongs_to_the_run_from_there_on(chain, tmp_path):
    run, change = tmp_path / "run", ["--loop.steps", "3", "--resume", "auto", "--caption_dropout", "0.5"]
    again = [*change, "--allow_change", "caption_dropout"]
    _, (first, _), (second, _) = run_in_ranks(
        1,
        chain.train_prior(run, "--loop.steps", "2"),
        chain.train_prior(run, *again),
        chain.train_prior(run, *change),
    )
    assert f"{run} goes on with changes that were allowed: caption_dropout was 0.1 and is 0.5" in first
    assert "that were allowed" not in second
    for folder in (run, run / "checkpoints/step-00000003"):
        assert read_json(folder / "config.json")["config"]["caption_dropout"] == 0.5
    assert read_json(run / "checkpoints/step-00000002/config.json")["config"]["caption_dropout"] == 0.1


FAILING = """
import dataclasses, sys
from dalle_ds.commands import train_prior
real = train_prior.make_stage

def fail(model, path):
    raise RuntimeError("no picture")

train_prior.make_stage = lambda *arguments: dataclasses.replace(real(*arguments), sample=fail)
from dalle_ds.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_fails_when_it_shows_its_last_pictures_has_saved_before(chain, tmp_path):
    """Bug: the last checkpoint came last, and all since the one before was lost."""
    arguments = chain.train_prior(tmp_path / "run", "--data.validation", chain / "tokens/validation")
    command = [sys.executable, "-c", FAILING, *arguments]
    done = subprocess.run(
        [str(word) for word in command], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no picture" in done.stderr
    with (tmp_path / "run/metrics.jsonl").open("r+") as metrics:  # as if it had died before that too
        lines = [line for line in metrics if '"validation"' not in line]
        metrics.seek(0)
        metrics.writelines(lines)
        metrics.truncate()
    (said, _), _ = run_in_ranks(1, *[[*arguments, "--resume", "auto"]] * 2)
    assert "nothing to do, 3 steps are done" in said
    # What the end of a run shows comes when it goes on; and not twice.
    assert (tmp_path / "run/samples/step-00000003.png").exists()
    assert [line["step"] for line in read_lines(tmp_path / "run", "validation")] == [3]


@pytest.mark.slow
def test_a_dvae_goes_on_after_and_inside_its_warm_start(chain, tmp_path):
    """The warm start has checkpoints of its own; a run that stopped right after it makes the codebook again."""
    whole, broken, early = tmp_path / "whole", tmp_path / "broken", tmp_path / "early"
    first = chain.train_dvae(broken, "--loop.steps", "2")
    run_in_ranks(2, chain.train_dvae(whole, "--loop.steps", "4"), first)
    shutil.copytree(whole / "warm_start", early / "warm_start")
    run_in_ranks(
        2,
        chain.train_dvae(broken, "--loop.steps", "4", "--resume", "auto"),
        chain.train_dvae(early, "--loop.steps", "4", "--resume", "auto"),
    )
    assert [line["step"] for line in read_lines(broken, "train")] == [1, 2, 3, 4]
    assert_same_weights(whole, broken)
    assert_same_weights(whole, early)


# --- as a user starts them --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_launch_scripts_run_as_one_process_with_plain_python(chain, tmp_path):
    launch = ROOT / "launch"
    dvae, tokens, prior, pictures = (tmp_path / name for name in ("dvae", "tokens", "prior", "pictures"))
    start(sys.executable, launch / "train_dvae.py", *chain.train_dvae(dvae)[1:])
    assert read_json(dvae / "config.json")["world_size"] == 1
    data = ["--data", chain / "scenes/train", "--out", tokens]
    start(sys.executable, launch / "encode_images.py", "--dvae", dvae, *data)
    start(sys.executable, launch / "train_prior.py", *chain.train_prior(prior, data=tokens)[1:])
    start(sys.executable, launch / "sample.py", "--prior", prior, "--out", pictures, "--n", 1, "a red circle")
    assert (pictures / "grid.png").exists()
    assert len(read_lines(prior, "train")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dvae", "prior"])
def test_the_deepspeed_launcher_trains_with_two_processes(chain, tmp_path, stage):
    out = tmp_path / stage
    command = (chain.train_dvae if stage == "dvae" else chain.train_prior)(out)
    said = start(*launcher(2), ROOT / "launch" / f"train_{stage}.py", *command[1:])
    assert said.count(f"{out}: steps 1 to 3 in") == 1
    assert read_json(out / "config.json")["world_size"] == 2
    checkpoint = out / "checkpoints/step-00000003"
    assert read_json(checkpoint / "state.json")["reader"]["epoch"] >= 0
    marker = read_json(checkpoint / "complete.json")
    assert (marker["step"], marker["world_size"]) == (3, 2)
    for name in ("config.json", "ds_config.json"):
        assert read_json(checkpoint / name) == read_json(out / name)
    assert (out / "samples/step-00000003.png").exists()
    assert (out / "tokenizer.model").exists() == (stage == "prior")


# --- a user's own data ------------------------------------------------------------------------------------------------


def make_picture(i, kind):
    """A picture of no square shape, larger than what the model sees."""
    rng = np.random.default_rng(i)
    pixels = np.zeros((50 + 7 * (i % 4), 90 - 5 * (i % 3), 3), np.uint8) + rng.integers(0, 200, 3, dtype=np.uint8)
    pixels[10:30, 20:50] = rng.integers(0, 256, 3)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def make_folder(folder):
    """Pictures at two depths, captions as .txt and as .json; one picture is broken, one has no caption."""
    for i in range(24):
        place = folder / ("more/deep" if i % 2 else ".")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.{'jpg' if i % 3 else 'png'}").write_bytes(make_picture(i, "JPEG" if i % 3 else "PNG"))
        if i % 5:
            (place / f"{i}.txt").write_text(f"picture number {i}\n")
        else:
            (place / f"{i}.json").write_text(json.dumps({"caption": f"picture number {i}", "licence": "none"}))
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("a broken picture")
    (folder / "mute.png").write_bytes(make_picture(99, "PNG"))
    return folder


def make_shards(folder):
    """Two shards as img2dataset writes them, with its .json and .parquet beside them; one picture is broken."""
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(12):
                key, caption = f"{shard:05d}{i:04d}", f"shard {shard} picture {i}"
                facts = {"caption": caption, "url": f"https://example.org/{key}", "key": key, "status": "success"}
                facts |= {"error_message": None, "width": 64, "height": 64, "exif": "{}", "sha256": "0"}
                picture = b"broken" if (shard, i) == (1, 3) else make_picture(12 * shard + i, "JPEG")
                for extension, content in (
                    ("jpg", picture),
                    ("json", json.dumps(facts).encode()),
                    ("txt", caption.encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("make_data", "n_good", "skipped"), [(make_folder, 24, 2), (make_shards, 23, 1)])
def test_a_users_own_data_go_through_the_whole_chain(chain, tmp_path, capsys, make_data, n_good, skipped):
    data = make_data(tmp_path / "data")
    tokenizer, dvae, tokens, prior = (tmp_path / name for name in ("t.model", "dvae", "tokens", "prior"))
    run_here("train-tokenizer", "--data", data, "--out", tokenizer, "--vocab_size", 300)
    [(said, _)] = run_in_ranks(1, chain.train_dvae(dvae, data=data))
    assert f"warning: {skipped} samples or shards were left out; {dvae / 'skipped.jsonl'} names them" in said
    run_here("encode-images", "--dvae", dvae, "--data", data, "--out", tokens)
    assert f"left out {skipped}" in capsys.readouterr().out
    run_in_ranks(1, chain.train_prior(prior, data=tokens, tokenizer=tokenizer))
    run_here("sample", "--prior", prior, "--out", tmp_path / "pictures", "picture number 3")
    assert read_json(tokens / "manifest.json")["n_samples"] == n_good
    names = [json.loads(line) for line in (tokens / "skipped.jsonl").read_text().splitlines()]
    assert len(names) == skipped
    assert any("does not decode" in name["reason"] for name in names)


def test_token_shards_keep_the_captions_of_a_users_json(tmp_path):
    source = open_source(str(make_folder(tmp_path / "data")))
    captions = [sample["caption"] for part in source.parts for sample in source.read(part)]
    assert sum(caption.startswith("picture number") for caption in captions) == 24
