"""A run folder: what may begin, what may go on, and what is written."""

import errno
import json

import pytest

from dalle_ds import __version__
from dalle_ds.config import InputError
from dalle_ds.training import folders
from dalle_ds.training.folders import begin, publish
from dalle_ds.training.portable import write_json
from dalle_ds.training.run import check_same_model, open_run, write_run

CONFIG = {"model": {"dim": 8}, "tokenizer": {"dropout": 0.1}, "loop": {"steps": 3, "seed": 0}, "data": {"train": "a"}}
FACTS = {"dvae_sha256": "aa", "tokenizer_sha256": "bb", "n_parameters": 5}


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", "prior", CONFIG, {"bf16": {"enabled": True}}, **FACTS)
    return tmp_path / "run"


def add_checkpoint(run, step, *, complete=True):
    folder = begin(run, step)
    record = write_json(folder / "state.json", {"step": step})
    return publish(folder, {"step": step, "files": {"state.json": record}}) if complete else folder


def test_what_is_written_says_what_the_run_was_asked_to_be(run):
    description = json.loads((run / "config.json").read_text())
    assert description == {"kind": "prior", "version": __version__, "config": CONFIG, **FACTS}
    assert json.loads((run / "ds_config.json").read_text()) == {"bf16": {"enabled": True}}
    assert (run / "samples").is_dir()


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_new_folder_begins_a_run(tmp_path, resume):
    assert open_run(tmp_path / "new", resume) is None
    assert open_run(tmp_path, resume) is None


def test_going_on_takes_the_newest_checkpoint_that_is_complete(run):
    assert open_run(run, "auto") is None
    add_checkpoint(run, 5)
    newest = add_checkpoint(run, 20)
    add_checkpoint(run, 100, complete=False)
    assert open_run(run, "auto") == newest


def test_a_damaged_checkpoint_is_named_and_left_alone_in_favour_of_the_one_before(run, capsys):
    good, cut, changed, lost = (add_checkpoint(run, step) for step in (5, 10, 15, 20))
    (cut / "state.json").write_text("{")
    (changed / "state.json").write_text('{"step": 16}\n')
    (lost / "state.json").unlink()
    assert open_run(run, "auto") == good
    said = capsys.readouterr().out.splitlines()
    assert [line.startswith("warning: ") for line in said] == [True] * 3
    for line, folder, fault in zip(said, (lost, changed, cut), ("missing", "another checksum", "1 bytes"), strict=True):
        assert str(folder) in line
        assert fault in line
    assert all(folder.exists() for folder in (cut, changed, lost))
    (good / "complete.json").write_text("{")
    with pytest.raises(InputError, match="all 4 checkpoints are damaged: bring back a copy of one, or choose another"):
        open_run(run, "auto")


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(run):
    (add_checkpoint(run, 5) / "complete.json").write_text('{"step": 5, "world_size": 2}')
    with pytest.raises(InputError, match="step-00000005 was written by an earlier version") as error:
        open_run(run, "auto")
    assert "\n" not in str(error.value)


def test_a_run_is_not_written_over(run):
    with pytest.raises(InputError, match=r"run already holds a run: pass --resume auto .* or choose another --out"):
        open_run(run, "none")


def test_other_words_and_other_files_are_refused(run):
    with pytest.raises(InputError, match="--resume 'last' is neither auto nor none"):
        open_run(run, "last")
    with pytest.raises(InputError, match=r"config\.json is a file: name a folder"):
        open_run(run / "config.json", "none")


def test_how_long_a_run_goes_on_may_change_and_what_it_learns_with_a_warning(run, capsys):
    loop = {"steps": 9, "seed": 0}
    check_same_model(run, "prior", {**CONFIG, "loop": loop}, {**FACTS, "n_parameters": 7})
    assert capsys.readouterr().out == ""
    check_same_model(run, "prior", {**CONFIG, "loop": loop, "data": {"train": "b"}, "averaging": 0.9}, FACTS)
    [said] = capsys.readouterr().out.splitlines()
    assert said == f"warning: {run} goes on with other settings than it had: data.train was a and is b"


@pytest.mark.parametrize(
    ("kind", "config", "facts", "said"),
    [
        ("dvae", CONFIG, FACTS, "holds a prior run, not a dvae run"),
        ("prior", {**CONFIG, "model": {"dim": 9}}, FACTS, "model.dim was 8 and is 9"),
        ("prior", {**CONFIG, "tokenizer": {"dropout": 0.2}}, FACTS, "tokenizer.dropout was 0.1 and is 0.2"),
        ("prior", {**CONFIG, "loop": {"steps": 3, "seed": 1}}, FACTS, "loop.seed was 0 and is 1"),
        ("prior", CONFIG, {**FACTS, "dvae_sha256": "cc"}, "tokens of another dVAE"),
        ("prior", CONFIG, {**FACTS, "tokenizer_sha256": "cc"}, "another tokenizer"),
    ],
)
def test_another_model_does_not_go_on(run, kind, config, facts, said):
    with pytest.raises(InputError, match=said) as error:
        check_same_model(run, kind, config, facts)
    assert str(run) in str(error.value)
    assert "another --out" in str(error.value)


def test_a_run_that_goes_on_with_a_full_disk_keeps_its_description(run, monkeypatch):
    """Bug: config.json was emptied before it was written, and a run without one can be neither resumed nor used."""
    before = (run / "config.json").read_text()

    def fill(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders, "sync", fill)
    with pytest.raises(OSError, match="No space"):
        write_run(run, "prior", {**CONFIG, "averaging": 0.5}, {}, **FACTS)
    assert (run / "config.json").read_text() == before
    check_same_model(run, "prior", CONFIG, FACTS)
