"""Folders of checkpoints: whenever a process is killed, what was complete stays; what is kept; what is damaged."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from dalle_ds.config import InputError
from dalle_ds.storage import files, folders, pieces
from dalle_ds.storage.files import measure, write_json
from dalle_ds.storage.folders import (
    begin,
    check_format,
    complete_checkpoints,
    find_faults,
    open_pieces,
    publish,
    remove,
    retain,
    run_of,
    step_of,
)
from dalle_ds.storage.pieces import Piece, write_pieces


def write(run, step, keep=2, keep_every=0):
    """All that a save does with files; a weight of the step's value."""
    folder = begin(run, step)
    (folder / "shards").mkdir()
    records = {
        "shards/0.safetensors": write_pieces(
            folder / "shards/0.safetensors",
            [Piece("w", "weight", 0, torch.full((3,), float(step)))],
            {"w": {"step": 1}},
        ),
        "state.json": write_json(folder / "state.json", {"step": step}),
    }
    assert all(measure(folder / name) == record for name, record in records.items())
    checkpoint = publish(folder, {"step": step, "files": records})
    retain(run, step, keep, keep_every)
    return checkpoint


def good_steps(run):
    return [step_of(checkpoint) for checkpoint in complete_checkpoints(run) if not find_faults(checkpoint)]


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# --- killed -----------------------------------------------------------------------------------------------------------

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def kill_at(n, action):
    """Runs `action` in a process that is killed just before its n-th operation on files; whether it came so far."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event, _):
            nonlocal seen
            if event in OPERATIONS:
                seen += 1
                if seen == n:
                    os.kill(os.getpid(), signal.SIGKILL)

        def sync(file):  # with the file still empty: what was written to it is in a buffer
            count("open", None)
            real_sync(file)

        real_sync, files.sync, pieces.sync = files.sync, sync, sync
        sys.addaudithook(count)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def before_nothing(run):
    write(run, 10), write(run, 20)


def before_same_step(run):
    before_nothing(run)
    write(run, 30, keep=3)


def before_damaged(run):
    before_same_step(run)
    (run / "checkpoints/step-00000030/state.json").write_text("{}")


def before_leftovers(run):
    """What a kill between two renames and one within a removal leave."""
    before_same_step(run)
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000030").rename(checkpoints / "replaced-step-00000030")
    shutil.copytree(checkpoints / "step-00000010", checkpoints / "step-00000005.partial")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("prepare", [before_nothing, before_same_step, before_damaged, before_leftovers])
def test_a_kill_before_any_operation_loses_no_checkpoint(tmp_path, prepare):
    n = 0
    while True:
        n += 1
        run = tmp_path / str(n)
        prepare(run)
        before = good_steps(run)
        was_killed = kill_at(n, lambda: write(run, 30))  # noqa: B023
        after = good_steps(run)
        assert max(after) >= max(before), n
        # The oldest one goes once the new one is there, and no other.
        assert set(before) - set(after) <= {10}, n
        assert 30 in after or set(before) <= set(after), n
        if not was_killed:
            break
        write(run, 40)
        assert good_steps(run) == [30, 40] if 30 in after else [20, 40], n
        assert [name for name in names(run) if not name.startswith(("step-", "corrupt-"))] == [], n
        assert not any(name.endswith(".partial") for name in names(run)), n
        shutil.rmtree(run)
    assert n > 15
    assert good_steps(run) == [20, 30]


# --- what stays -------------------------------------------------------------------------------------------------------


def test_the_newest_stay_and_every_nth_for_ever(tmp_path):
    for step in range(10, 101, 10):
        write(tmp_path, step, keep=2, keep_every=40)
    assert good_steps(tmp_path) == [40, 80, 90, 100]
    assert names(tmp_path) == [f"step-{step:08d}" for step in (40, 80, 90, 100)]


def test_what_is_of_a_later_step_is_left_alone(tmp_path):
    write(tmp_path, 10), write(tmp_path, 90)
    write(tmp_path, 20, keep=1)
    assert good_steps(tmp_path) == [20, 90]


def test_a_damaged_checkpoint_of_the_same_step_is_put_aside_and_stays(tmp_path):
    for content in ("a", "b"):
        damaged = write(tmp_path, 10)
        (damaged / "state.json").write_text(content)
    write(tmp_path, 10)
    write(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["corrupt-step-00000010", "corrupt-step-00000010-2", "step-00000020"]
    assert (tmp_path / "checkpoints/corrupt-step-00000010/state.json").read_text() == "a"


def test_a_step_saved_twice_holds_the_later_one(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 10)
    assert names(tmp_path) == ["step-00000010"]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_every_changed_byte_and_every_cut_is_found(tmp_path):
    checkpoint = write(tmp_path, 10)
    assert find_faults(checkpoint) == []
    for name in ("state.json", "shards/0.safetensors"):
        path = checkpoint / name
        content = path.read_bytes()
        for i in range(len(content)):
            path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
            assert find_faults(checkpoint) == [f"{path} has another checksum than when it was written"]
            path.write_bytes(content[:i])
            assert find_faults(checkpoint) == [f"{path} has {i} bytes and was written with {len(content)}"]
        path.write_bytes(content)
    assert find_faults(checkpoint) == []
    (checkpoint / folders.MARKER).write_text('{"form')
    assert find_faults(checkpoint) == [f"{checkpoint / folders.MARKER} cannot be read"]


def test_sizes_alone_are_looked_at_where_that_is_asked_for(tmp_path):
    checkpoint = write(tmp_path, 10)
    (checkpoint / "state.json").write_text((checkpoint / "state.json").read_text().replace("10", "11"))
    assert find_faults(checkpoint, contents=False) == []
    assert len(find_faults(checkpoint)) == 1
    (checkpoint / "state.json").write_text("{}")
    assert "has 2 bytes" in find_faults(checkpoint, contents=False)[0]


def test_a_checkpoint_reads_back(tmp_path):
    checkpoint = write(tmp_path, 10)
    with open_pieces(checkpoint) as reader:
        assert reader.read("w", "weight", 0, 3).tolist() == [10.0] * 3
    assert run_of(checkpoint) == run_of(tmp_path) == tmp_path


def test_a_checkpoint_of_another_format_is_refused_in_one_line(tmp_path):
    checkpoint = write(tmp_path, 10)
    check_format(checkpoint)
    for content in ("", "{", "{}"):
        (checkpoint / folders.MARKER).write_text(content)
        with pytest.raises(InputError, match=r"complete.json cannot be read: bring back a copy, or give an older"):
            check_format(checkpoint)
    for content in ('{"step": 10, "files": {}}', '{"format": 2, "step": 10, "files": {}}'):
        (checkpoint / folders.MARKER).write_text(content)
        with pytest.raises(InputError, match="step-00000010 was written by another version") as error:
            check_format(checkpoint)
        assert "\n" not in str(error.value)


# --- on the disk ------------------------------------------------------------------------------------------------------


def test_files_are_on_the_disk_before_their_folders_these_before_the_name_and_then_the_folder_above(
    tmp_path, monkeypatch
):
    """What a power cut leaves: a name only where all that it stands for is there."""
    done = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path / "checkpoints").as_posix())
        real_fsync(descriptor)

    def rename(path, target):
        done.append(f"{path.name} -> {target.name}")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    folder = begin(tmp_path, 5)
    (folder / "shards").mkdir()
    records = {
        "shards/0.safetensors": write_pieces(folder / "shards/0.safetensors", [], {}),
        "state.json": write_json(folder / "state.json", 1),
    }
    publish(folder, {"step": 5, "files": records})
    partial = "step-00000005.partial"
    assert done == [
        f"{partial}/shards/0.safetensors",
        f"{partial}/state.json",
        f"{partial}/complete.json",
        f"{partial}/shards",
        partial,
        f"{partial} -> step-00000005",
        ".",
    ]


def test_what_cannot_be_removed_is_no_reason_to_end_a_run(tmp_path, monkeypatch):
    """On a network disk, files that a killed process still holds open stay, as .nfs..., and so does their folder."""
    real = shutil.rmtree

    def rmtree(path, ignore_errors=False):
        if Path(path).name.endswith(".partial"):
            for child in Path(path).iterdir():
                real(child, ignore_errors=True) if child.is_dir() else child.unlink()
            (Path(path) / ".nfs0001").touch()
            if not ignore_errors:
                raise OSError(39, "Directory not empty")
        else:
            real(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    for _ in range(3):
        begin(tmp_path, 10)
    write(tmp_path, 10, keep=1), write(tmp_path, 20, keep=1), write(tmp_path, 20, keep=1)
    assert good_steps(tmp_path) == [20]
    remove(tmp_path / "checkpoints/step-00000020")
    assert good_steps(tmp_path) == []
    monkeypatch.undo()
    write(tmp_path, 30)
    assert names(tmp_path) == ["step-00000030"]
