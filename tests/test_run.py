"""A run folder: what may begin, what may go on, and what is written."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from helpers import run_distributed

from dalle_ds.config import InputError
from dalle_ds.storage import files
from dalle_ds.storage.files import write_json
from dalle_ds.storage.folders import begin, complete_checkpoints, publish, retain
from dalle_ds.training.run import fetched, open_run, write_run

DOCUMENTS = {"ds_config.json": {"bf16": {"enabled": True}}, "config.json": {"kind": "prior", "config": {}}}


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", DOCUMENTS)
    return tmp_path / "run"


def add_checkpoint(run, step, *, complete=True, **description):
    folder = begin(run, step)
    records = {
        "state.json": write_json(folder / "state.json", {"step": step}),
        "config.json": write_json(folder / "config.json", {**DOCUMENTS["config.json"], **description}),
    }
    return publish(folder, {"step": step, "files": records}) if complete else folder


def test_what_is_written_says_what_the_run_was_asked_to_be(run):
    assert json.loads((run / "config.json").read_text()) == DOCUMENTS["config.json"]
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
    write_run(run, DOCUMENTS, 5)
    assert [checkpoint.name for checkpoint in complete_checkpoints(run)] == [good.name]
    aside = sorted(path.name for path in (run / "checkpoints").glob("corrupt-*"))
    assert aside == [f"corrupt-step-000000{step}" for step in (10, 15, 20)]
    # They are not among those to keep, nor taken away.
    add_checkpoint(run, 30)
    retain(run, 30, keep=2)
    assert [checkpoint.name for checkpoint in complete_checkpoints(run)] == [good.name, "step-00000030"]
    assert all((run / "checkpoints" / name).exists() for name in aside)
    shutil.rmtree(run / "checkpoints/step-00000030")
    (good / "complete.json").write_text("{")
    with pytest.raises(InputError, match="all 1 checkpoints are damaged: bring back a copy of one, or choose another"):
        open_run(run, "auto")


def test_a_checkpoint_of_another_version_is_refused_in_one_line(run):
    (add_checkpoint(run, 5) / "complete.json").write_text('{"step": 5, "world_size": 2}')
    with pytest.raises(InputError, match="step-00000005 was written by another version") as error:
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


def test_imported_weights_are_no_run_to_go_on_with(run):
    add_checkpoint(run, 5, imported={})
    with pytest.raises(InputError, match=rf"no optimizer: pass --init_from {run} and another --out"):
        open_run(run, "auto")


def test_a_run_that_goes_on_with_a_full_disk_keeps_its_description(run, monkeypatch):
    """Bug: config.json was emptied before it was written, and a run without one can be neither resumed nor used."""
    before = (run / "config.json").read_text()

    def fill(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", fill)
    with pytest.raises(OSError, match="No space"):
        write_run(run, {"config.json": {}})
    assert (run / "config.json").read_text() == before


# --- several ranks ----------------------------------------------------------------------------------------------------


def open_together(out, seen_by_first):
    """What each rank makes of a run folder, in which the first one may see nothing yet."""
    from dalle_ds.training import run as run_module
    from dalle_ds.training.distributed import process_group

    with process_group() as ranks:
        if ranks.is_first and not seen_by_first:
            run_module.complete_checkpoints = lambda run: []
        try:
            return open_run(Path(out), "auto")
        except InputError as error:
            return str(error)


def test_the_first_rank_says_what_there_is_whatever_the_others_see(run):
    """Bug: each decided by itself; where one saw a checkpoint, and another did not yet, they waited for each other."""
    add_checkpoint(run, 5)
    assert run_distributed(open_together, 2, run, False) == [None, None]
    assert run_distributed(open_together, 2, run, True) == [run / "checkpoints/step-00000005"] * 2


def hide_from(folder, blind):
    """What each rank says where one of them does not see the run folder, which the first one does."""
    import os
    import socket

    from dalle_ds.training import run as run_module
    from dalle_ds.training.distributed import process_group

    run_module.LATE_SECONDS, said = 0.0, []
    if int(os.environ["RANK"]) == blind:
        run_module.read_marker = lambda checkpoint: {}
        folder = folder / "elsewhere"
        socket.gethostname = lambda: "node7"
    with process_group():
        for action in (lambda: open_run(folder, "auto"), lambda: write_run(folder, DOCUMENTS)):
            try:
                action()
            except InputError as error:
                said.append(str(error))
    return said


def test_a_rank_that_does_not_see_what_the_first_one_sees_is_named_with_its_host(run):
    checkpoint = add_checkpoint(run, 5)
    for rank, by_action in enumerate(run_distributed(hide_from, 3, run, 2)):
        own = run / "elsewhere" if rank == 2 else run
        for said, file in zip(by_action, (own / checkpoint.relative_to(run), own / "config.json"), strict=True):
            assert said.startswith(f"rank 2 on node7 does not see {file}, which rank 0 on ")
            assert said.endswith("sees: --out must be on a disk that all machines share")


def see_late(folder):
    """What each rank takes where the second one sees the checkpoint only when it looks again."""
    import os

    from dalle_ds.training import run as run_module
    from dalle_ds.training.distributed import process_group

    real, looks = run_module.read_marker, []

    def read_marker(checkpoint):
        looks.append(checkpoint)
        return {} if os.environ["RANK"] == "1" and len(looks) == 1 else real(checkpoint)

    run_module.read_marker = read_marker
    with process_group():
        return open_run(folder, "auto")


def test_a_network_disk_may_be_late(run):
    checkpoint = add_checkpoint(run, 5)
    assert run_distributed(see_late, 2, run) == [checkpoint] * 2


def fetch_slowly(out, seconds):
    """A fetch that takes longer than collectives may, and then one that fails."""
    import time

    from dalle_ds.training import agreement, distributed

    agreement.BEAT, distributed.MARGIN = 0.2, 0.0
    calls = []

    def fetch(url, run):
        calls.append(url)
        time.sleep(seconds)
        if url == "s3://nowhere":
            raise InputError("no complete checkpoint there")

    with distributed.process_group(seconds / 2 / 60):
        said = [fetched("s3://there", Path(out), fetch)]
        try:
            fetched("s3://nowhere", Path(out), fetch)
        except InputError as error:
            said.append(str(error))
    return said, len(calls)


def test_the_others_wait_for_a_fetch_longer_than_for_each_other(tmp_path):
    said = ["auto", "no complete checkpoint there"]
    assert run_distributed(fetch_slowly, 2, tmp_path, 4.0) == [(said, 2), (said, 0)]
