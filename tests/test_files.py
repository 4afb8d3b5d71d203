"""Files and folders of a run: whole or not there, whatever happens while they are written."""

import errno
from pathlib import Path

import pytest

from dalle_ds.config import InputError
from dalle_ds.storage import files
from dalle_ds.storage.files import measure, new_folder, read_json, replace_file, write_json


@pytest.mark.parametrize("broken", ["sync", "replace"])
def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch, broken):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "config.json").write_text("old")
    monkeypatch.setattr({"sync": files, "replace": Path}[broken], broken, fail)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "config.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "old"
    monkeypatch.undo()
    replace_file(tmp_path / "config.json", b"new")
    assert (tmp_path / "config.json").read_text() == "new"


def test_the_record_of_what_was_written_is_that_of_what_is_read(tmp_path):
    assert write_json(tmp_path / "a.json", {"b": [1]}) == measure(tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == {"b": [1]}
    (tmp_path / "list.json").write_text("[1]")
    assert read_json(tmp_path / "list.json") == read_json(tmp_path / "none.json") == {}


def test_a_new_folder_takes_its_name_when_it_is_done_and_is_gone_when_something_fails(tmp_path):
    out = tmp_path / "more/out"

    def fail():
        with new_folder(out) as folder:
            (folder / "file").touch()
            assert not out.exists()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(out.parent.iterdir()) == []
    out.mkdir()  # empty: as good as none
    with new_folder(out) as folder:
        (folder / "file").touch()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_that_holds_anything_is_not_written_into(tmp_path):
    run, full, file = tmp_path / "run", tmp_path / "full", tmp_path / "file"
    for folder, name in ((run, "config.json"), (full, "thesis.tex")):
        folder.mkdir()
        (folder / name).touch()
    file.touch()
    for out, said in ((run, "already holds a run"), (full, "is not empty"), (file, "is a file: name a folder")):
        with pytest.raises(InputError, match=said), new_folder(out):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "run"]
