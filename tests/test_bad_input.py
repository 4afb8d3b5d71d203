"""A user's mistakes: exit code 2, one line that names file, value and remedy, and nothing written."""

import json
import os
import subprocess
import sys

import pytest
from conftest import CONFIGS, run_here, run_in_ranks
from helpers import call_commands, run_distributed
from programs import ROOT, TIMEOUT, environment, launcher
from test_commands import make_picture

from dalle_ds.data.writer import ShardWriter

GOOD_JSON = json.loads((CONFIGS / "cpu_zero3.json").read_text())
# DeepSpeed configs: the text, or what differs from a good one.
BAD_JSONS = {
    "unknown": {"gradient_cliping": 1.0},
    "unknown-zero": {"zero_optimization": {"stage": 3, "stagee": 1}},
    "malformed": '{"optimizer": {,}}',
    "stage-x": {"zero_optimization": {"stage": "x"}},
    "micro-x": {"train_micro_batch_size_per_gpu": "x"},
    "other-lr": {"optimizer": {**GOOD_JSON["optimizer"], "params": {**GOOD_JSON["optimizer"]["params"], "lr": 0.5}}},
    "lr-x": {"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}},
}
# What is changed in a command that would work (the last of two equal flags counts), and what the line must say.
CASES = {
    # data
    "train-dvae --data.train {bad}/none-{{0..3}}.tar": ["none-0.tar", "give a folder"],
    "train-dvae --data.train {bad}/nowhere": ["bad0/nowhere", "give a folder"],
    "train-dvae --data.train {bad}/none-*.tar": ["no shards match", "none-*.tar", "give a folder"],
    "train-dvae --data.train=": ["--data.train is missing", "name a folder"],
    "train-dvae --data.train {bad}/mute": ["mute/00000.tar: no sample has a caption", "put a"],
    "train-dvae --data.train {chain}/tokens/train": ["train/00000.tar: no sample has a picture", "give shards"],
    "encode-images --data {bad}/mute": ["mute/00000.tar: no sample has a caption", "put a"],
    "encode-images --data {chain}/tokens/train": ["train/00000.tar: no sample has a picture", "give shards"],
    "train-prior --data.train {chain}/scenes/train": ["scenes/train: not token shards", "encode-images"],
    "train-prior --data.validation {bad}/other_tokens": ["other_tokens: its tokens are of another dVAE", "encode both"],
    "evaluate --data {bad}/untrue": ["untrue holds no scenes", "make-scenes"],
    "evaluate --data {bad}/nowhere": ["bad0/nowhere", "give a folder"],
    # settings
    "train-dvae --preset huge": ["--preset 'huge'", "presets are tiny", "12b"],
    "train-prior --preset huge": ["--preset 'huge'", "presets are tiny", "12b"],
    "train-dvae --model.image_size 33": ["image_size 33", "multiple of 8"],
    "train-dvae --resume maybe": ["--resume 'maybe'", "auto"],
    "sample --n 0": ["--n 0", "at least 1"],
    # DeepSpeed JSON
    "train-prior --deepspeed_config {bad}/no.json": ["no.json: no such DeepSpeed config", "ds_configs/"],
    "train-prior --deepspeed_config {bad}/malformed.json": ["malformed.json: not JSON", "line 1"],
    "train-prior --deepspeed_config {bad}/unknown.json": ["unknown.json", "'gradient_cliping'", "'gradient_clipping'"],
    "train-prior --deepspeed_config {bad}/unknown-zero.json": ["'zero_optimization'", "'stagee'", "'stage'"],
    "train-prior --deepspeed_config {bad}/stage-x.json": ["stage-x.json", "stage 'x'", "0, 1, 2"],
    "train-dvae --deepspeed_config {bad}/stage-x.json": ["stage-x.json", "stage 'x'", "0, 1, 2"],
    "train-prior --deepspeed_config {bad}/micro-x.json": ["micro-x.json", "per_gpu 'x'", "whole number"],
    "train-prior --deepspeed_config {bad}/lr-x.json": ["lr-x.json", "optimizer.params.lr 'fast'", "a number"],
    "train-dvae --deepspeed_config {zero3}": [
        "cpu_zero3.json: a warm start needs whole",
        "warm_start_steps 0",
    ],
    # models that do not belong together
    "train-prior --dvae {chain}/prior": ["prior holds a prior", "give a dvae run"],
    "train-prior --dvae {chain}/other_dvae": [
        "other_dvae is not the dVAE",
        "tokens/train",
        "encode the pictures again",
    ],
    "train-prior --tokenizer {bad}/no.model": ["no.model: no such tokenizer", "train-tokenizer"],
    "train-prior --tokenizer {bad}/words.model": ["words.model: not a tokenizer", "train-tokenizer"],
    "encode-images --dvae {chain}/prior": ["prior holds a prior", "give a dvae run"],
    "encode-images --dvae {bad}": ["bad0 is no run folder", "train-dvae"],
    "sample --prior {chain}/dvae": ["dvae holds a dvae", "give a prior run"],
    "sample --dvae {chain}/prior": ["prior holds a prior", "give a dvae run"],
    "sample --dvae {chain}/other_dvae": ["other_dvae is not the dVAE", "--dvae"],
    "evaluate --dvae {chain}/other_dvae": ["other_dvae is not the dVAE", "--dvae"],
    "report {bad}": ["bad0 is no run folder", "give the folder"],
    "report {chain}/prior --dvae {chain}/prior": ["prior", "dvae"],
    # what is there already
    "train-dvae --out {chain}/dvae": ["dvae already holds a run", "--resume auto", "--out"],
    "train-prior --out {chain}/prior": ["prior already holds a run", "--resume auto", "--out"],
    "encode-images --out {chain}/tokens/train": ["tokens/train already holds shards", "--overwrite"],
    "train-dvae --out {chain}/dvae --resume auto --model.n_hid 16": ["model.n_hid was 8 and is 16", "another --out"],
    "train-prior --out {chain}/prior --resume auto --model.n_layer 3": [
        "model.n_layer was 2 and is 3",
        "another --out",
    ],
    "train-prior --out {chain}/prior --resume auto --tokenizer {bad}/other.model": ["_size was 400", "another --out"],
    "train-prior --out {chain}/prior --resume auto --data.train {bad}/other_tokens": [
        "tokens of another dVAE",
        "--out",
    ],
    "train-prior --out {chain}/prior --resume auto --deepspeed_config {bad}/other-lr.json --caption_dropout 0.5": [
        "caption_dropout was 0.1 and is 0.5; optimizer.params.lr was 0.004 and is 0.5",
        "--allow_change caption_dropout optimizer.params.lr",
    ],
    "train-prior --out {chain}/dvae --resume auto": ["dvae holds a dvae run, not a prior run", "--out"],
    "train-dvae --out {bad}/file": ["file is a file", "name a folder"],
    "sample --out {bad}/file": ["file is a file", "name a folder"],
    "encode-images --out {bad}/file": ["file is a file", "name a folder"],
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory, chain):
    """A folder of things that are wrong: JSON files, shards, and what another dVAE made."""
    root = tmp_path_factory.mktemp("bad")
    for name, change in BAD_JSONS.items():
        (root / f"{name}.json").write_text(change if isinstance(change, str) else json.dumps({**GOOD_JSON, **change}))
    samples = {
        "mute": {"png": make_picture(0, "PNG")},
        "broken": {"png": b"no picture", "txt": b"a red circle"},
        "untrue": {"png": make_picture(0, "PNG"), "txt": b"a red circle"},
    }
    for name, sample in samples.items():
        with ShardWriter(root / name, samples_per_shard=10) as writer:
            for _ in range(12):
                writer.write(sample)
    run_here("train-tokenizer", "--data", root / "untrue", "--out", root / "other.model", "--vocab_size", 270)
    run_here("encode-images", "--dvae", chain / "other_dvae", "--data", root / "untrue", "--out", root / "other_tokens")
    (root / "file").write_text("in the way")
    (root / "words.model").write_text("no tokenizer")
    return root


def good_command(name, chain, bad, out):
    """The command `name` with flags that would work."""
    model = ["--prior", chain / "prior"]
    return {
        "train-dvae": chain.train_dvae(out),
        "train-prior": chain.train_prior(out),
        "encode-images": [name, "--dvae", chain / "dvae", "--data", bad / "untrue", "--out", out],
        "sample": [name, *model, "--out", out, "a red circle"],
        "evaluate": [name, *model, "--data", chain / "scenes/held_out", "--n", 4],
        "report": [name],
    }[name]


def list_files(*folders):
    """Every file below, with its size and time."""
    files = [path for folder in folders for path in folder.rglob("*")]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def assert_one_line(said, command, words):
    assert said.startswith(f"dalle-ds {command}: error: ")
    assert said.endswith("\n")
    assert said.count("\n") == 1
    for word in words:
        assert word in said


@pytest.fixture(scope="module")
def refusals(chain, bad, tmp_path_factory):
    """(case -> its exit code, output and error; the files that appeared or changed), from one process for all."""
    folder = tmp_path_factory.mktemp("refused")
    places = {"chain": chain.root, "bad": bad, "zero3": CONFIGS / "cpu_zero3.json"}
    commands = []
    for case in CASES:
        name, *change = case.split()
        commands.append([*good_command(name, chain, bad, folder / "out"), *(word.format(**places) for word in change)])
    before = list_files(chain.root, bad, folder)
    [results] = run_distributed(call_commands, 1, *commands)
    after = list_files(chain.root, bad, folder)
    return dict(zip(CASES, results, strict=True)), {
        path for path in before | after if before.get(path) != after.get(path)
    }


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_exit_code_2(refusals, case):
    code, _, said = refusals[0][case]
    assert code == 2, said
    assert_one_line(said, case.split()[0], CASES[case])


def test_a_refused_command_writes_nothing(refusals):
    assert refusals[1] == set()


def test_data_of_which_no_picture_decodes_are_refused_and_leave_no_shard(chain, bad, tmp_path, capsys):
    from dalle_ds.cli import main

    out = tmp_path / "tokens"
    command = ["encode-images", "--dvae", chain / "dvae", "--data", bad / "broken", "--out", out]
    assert main([str(word) for word in command]) == 2
    assert_one_line(capsys.readouterr().err, "encode-images", ["not one of 12 samples", "does not decode", "00000.tar"])
    assert [path.name for path in out.iterdir()] == ["skipped.jsonl"]


# --- under the launcher -----------------------------------------------------------------------------------------------


def launch(stage, command):
    """A training command by the deepspeed launcher with two processes; returns exit code and all that was printed."""
    words = [*launcher(2), ROOT / "launch" / f"train_{stage}.py", *command[1:]]
    done = subprocess.run(
        [str(word) for word in words],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_two_processes_say_it_once(chain, bad, tmp_path):
    command = chain.train_prior(tmp_path / "out", "--deepspeed_config", bad / "unknown.json")
    code, said = launch("prior", command)
    assert code == 2
    assert said.count("dalle-ds train-prior: error:") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


# --- full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Mounts file systems of few bytes: needs Linux and root."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(["mount", *options], check=False).returncode:
            pytest.skip("cannot mount a small disk here; test_writer.py and test_training.py have a made one")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_token_shards_on_a_full_disk_end_in_one_line_without_half_a_shard(chain, small_disk, capsys):
    from dalle_ds.cli import main

    out = small_disk(100_000) / "tokens"
    command = ["encode-images", "--dvae", chain / "dvae", "--data", chain / "scenes/train", "--out", out]
    assert main([str(word) for word in command]) == 2
    words = [f"{out}/0000", "the disk is full", "free some space"]
    assert_one_line(capsys.readouterr().err, "encode-images", words)
    left = sorted(path.name for path in out.iterdir() if path.name != "encoding")
    assert left == [f"{shard:05d}.tar" for shard in range(len(left))]
    assert 0 < len(left) < 3


@pytest.mark.slow
@pytest.mark.parametrize("room", [1.3, 2.7], ids=["first-checkpoint", "later-checkpoint"])
def test_a_checkpoint_on_a_full_disk_ends_two_processes_in_one_line_and_the_run_goes_on_later(chain, small_disk, room):
    """The rank that fails removes the checkpoint under the hands of the other, which must leave the word to it."""
    checkpoint = sum(file.stat().st_size for file in (chain / "prior/checkpoints").rglob("*") if file.is_file())
    disk = small_disk(int(room * checkpoint))
    command = chain.train_prior(disk / "run", "--loop.save_every", "1", "--loop.steps", "4", "--loop.keep", "4")
    code, said = launch("prior", command)
    assert code == 2, said
    assert said.count("dalle-ds train-prior: error:") == 1
    assert "the disk is full; free some space and go on with --resume auto" in said
    checkpoints = sorted((disk / "run/checkpoints").glob("step-*"))
    assert len(checkpoints) == int(room) - 1
    assert all((path / "complete.json").exists() for path in checkpoints)
    subprocess.run(["mount", "-o", f"remount,size={20 * checkpoint}", str(disk)], check=True)
    [(said, _)] = run_in_ranks(2, [*command, "--resume", "auto"])
    assert f"steps {len(checkpoints) + 1} to 4" in said
    assert (disk / "run/tokenizer.model").exists()
