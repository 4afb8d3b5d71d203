"""Folders of checkpoints: whenever a process is killed, what was complete stays; what is kept; what is damaged."""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from dalle_ds.training import folders, portable
from dalle_ds.training.folders import begin, complete_checkpoints, find_faults, publish, replace_text, retain, step_of
from dalle_ds.training.portable import Piece, PieceReader, measure, write_json, write_pieces


def write(run, step, keep=2, keep_every=0):
    """All that a save does with files; a weight of the step's value."""
    folder = begin(run, step)
    (folder / "shards").mkdir()
    files = {
        "shards/0.safetensors": write_pieces(
            folder / "shards/0.safetensors",
            [Piece("w", "weight", 0, torch.full((3,), float(step)))],
            {"w": {"step": 1}},
        ),
        "state.json": write_json(folder / "state.json", {"step": step}),
    }
    assert all(measure(folder / name) == record for name, record in files.items())
    checkpoint = publish(folder, {"step": step, "files": files})
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

        real_sync, portable.sync = portable.sync, sync
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


def test_a_checkpoint_reads_back(tmp_path):
    with PieceReader([write(tmp_path, 10) / "shards/0.safetensors"]) as reader:
        assert reader.read("w", "weight", 0, 3).tolist() == [10.0] * 3


@pytest.mark.parametrize("broken", ["sync", "replace"])
def test_a_text_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch, broken):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "config.json").write_text("old")
    monkeypatch.setattr({"sync": folders, "replace": Path}[broken], broken, fail)
    with pytest.raises(OSError, match="No space"):
        replace_text(tmp_path / "config.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "old"
    monkeypatch.undo()
    replace_text(tmp_path / "config.json", "new")
    assert (tmp_path / "config.json").read_text() == "new"
