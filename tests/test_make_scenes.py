"""`dalle-ds make-scenes`: what it writes, what it refuses, and what it leaves behind when it fails."""

import errno
import hashlib
import json
import os
import tarfile

import pytest

from dalle_ds.cli import main
from dalle_ds.commands import make_scenes
from dalle_ds.data import writer

SMALL = ["--n_train", "5", "--n_validation", "3", "--n_held_out", "4", "--samples_per_shard", "2"]


def make(out, *flags):
    return main(["make-scenes", str(out), *SMALL, *flags])


def hash_files(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.setattr(make_scenes, "MAX_WORKERS", 1)  # starting processes takes a second; one test does it


def test_the_data_set_has_shards_for_each_split_and_says_how_it_was_made(tmp_path, capsys):
    out = tmp_path / "new" / "scenes"
    assert make(out) == 0
    assert list(hash_files(out)) == [
        "held_out/00000.tar",
        "held_out/00001.tar",
        "held_out_combinations.json",
        "scenes.json",
        "train/00000.tar",
        "train/00001.tar",
        "train/00002.tar",
        "validation/00000.tar",
        "validation/00001.tar",
    ]
    assert "5 train, 3 validation, 4 held_out" in capsys.readouterr().out
    with tarfile.open(out / "train" / "00002.tar") as tar:
        assert tar.getnames() == ["000020000.png", "000020000.txt", "000020000.json"]
    config = json.loads((out / "scenes.json").read_text())
    assert (config["n_train"], config["image_size"]) == (5, 64)
    lists = json.loads((out / "held_out_combinations.json").read_text())
    assert (len(lists["pairs"]), len(lists["triples"])) == (6, 38)


def test_the_bytes_are_the_same_whatever_the_number_of_processes(tmp_path, monkeypatch):
    make(tmp_path / "one")
    monkeypatch.setattr(make_scenes, "MAX_WORKERS", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    make(tmp_path / "two")
    assert hash_files(tmp_path / "one") == hash_files(tmp_path / "two")
    make(tmp_path / "seed", "--seed", "1")
    assert hash_files(tmp_path / "one")["train/00000.tar"] != hash_files(tmp_path / "seed")["train/00000.tar"]


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert make(tmp_path) == 2
    assert "is not empty (it holds notes.txt)" in capsys.readouterr().err
    assert make(tmp_path, "--overwrite") == 2  # not a data set of ours: never removed
    assert "not ours to overwrite" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_overwriting_replaces_the_data_set_and_leaves_other_files_alone(tmp_path):
    out = tmp_path / "scenes"
    make(out)
    (out / "notes.txt").write_text("mine")
    assert make(out, "--overwrite", "--n_train", "1", "--n_validation", "0") == 0
    files = hash_files(out)
    assert [name for name in files if name.startswith(("train", "validation"))] == ["train/00000.tar"]
    assert "notes.txt" in files


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image_size", "16"], "image_size 16"),
        (["--image_format", "gif"], "image_format 'gif'"),
        (["--seed", "-1"], "seed -1"),
        (["--samples_per_shard", "20000"], "samples_per_shard 20000"),
    ],
)
def test_bad_settings_are_one_line_and_write_nothing(tmp_path, capsys, flags, words):
    out = tmp_path / "scenes"
    assert make(out, *flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_file_where_the_folder_should_be_is_refused(tmp_path, capsys):
    (tmp_path / "scenes").write_text("")
    assert make(tmp_path / "scenes") == 2
    assert "is a file: name a folder" in capsys.readouterr().err


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "overwriting"])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, capsys, before):
    out = tmp_path / "scenes"
    if before:
        make(out)
    kept = hash_files(out)
    n_opened = 0

    def fill_disk(*args):
        nonlocal n_opened
        n_opened += 1
        if n_opened == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(*args)

    monkeypatch.setattr(writer, "open", fill_disk, raising=False)
    capsys.readouterr()
    assert make(out, "--overwrite", "--seed", "1") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert hash_files(out) == kept
    assert out.exists() == before
