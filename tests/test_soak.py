"""The soak: what it draws, that it sees what is lost, and a few kills of the real run."""

import collections
import errno
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from parts.measuring import ROOT
from parts.small_disk import SmallDisk
from parts.soak_blows import KINDS, PHASES, Blow, draw
from parts.soak_folder import RunFolder, differences
from parts.soak_report import Arm, Outcome, Result, report
from parts.soak_run import make_inputs

from benchmarks.soak import Soak
from dalle_ds.storage.files import write_json
from dalle_ds.storage.folders import begin, publish
from dalle_ds.storage.pieces import Piece, write_pieces
from dalle_ds.training.metrics import MetricsLog

EVERY_STEP = Arm(save_every=1, kinds=tuple(KINDS))
OUTCOME = Outcome(kind="kill", phase="training", codes=[-9], began=0, reached=3, newest=2, in_save=False, problems=[])


def blows(seed, n):
    return list(itertools.islice(draw(np.random.default_rng(seed), list(KINDS), 4), n))


def save(run, step, value=1.0):
    """A checkpoint of one weight."""
    folder = begin(run, step)
    files = {
        "shard.safetensors": write_pieces(
            folder / "shard.safetensors", [Piece("w", "weight", 0, torch.full((3,), value))], {}
        ),
        "state.json": write_json(folder / "state.json", {"step": step}),
    }
    return publish(folder, {"step": step, "files": files})


def test_a_seed_draws_the_same_blows_each_kind_as_often_and_each_moment_rank_and_signal_some_time():
    drawn = blows(7, 400)
    assert drawn == blows(7, 400) != blows(8, 400)
    assert set(collections.Counter(blow.kind for blow in drawn).values()) == {100}
    assert {(blow.kind, blow.phase) for blow in drawn} == {(kind, phase) for kind in KINDS for phase in KINDS[kind]}
    assert {phase for phases in KINDS.values() for phase in phases} == set(PHASES)
    assert {blow.rank for blow in drawn} == {0, 1, 2, 3}
    assert {blow.signal.name for blow in drawn} == {"SIGKILL", "SIGTERM", "SIGUSR1"}


def test_a_full_disk_is_full_until_it_is_cleared(tmp_path):
    with SmallDisk(tmp_path / "disk", 2**20) as disk:
        if not disk.can_fill:
            pytest.skip("needs the right to mount a file system")
        disk.fill(room=2**16)
        with pytest.raises(OSError, match="No space left") as raised:
            (disk.folder / "file").write_bytes(bytes(2**17))
        assert raised.value.errno == errno.ENOSPC
        (disk.folder / "file").unlink()
        disk.clear()
        (disk.folder / "file").write_bytes(bytes(2**17))
    assert list(disk.folder.iterdir()) == []


def test_an_onlooker_sees_how_far_an_attempt_is_and_not_what_earlier_ones_left(tmp_path):
    save(tmp_path, 1)
    MetricsLog(tmp_path / "metrics.jsonl").write(2, "train", {"loss": 1.0})
    os.utime(begin(tmp_path, 2), (1, 1))  # left long ago
    run = RunFolder(tmp_path)
    assert (run.start, run.newest(), run.saving(), run.last_step(), run.is_under_way()) == (1, 1, 0, 1, False)
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=1)
    assert (run.last_step(), run.is_under_way()) == (1, True)
    log.write(2, "train", {"loss": 1.0})
    with log.path.open("a") as file:
        file.write('{"step": 3, "ki')
    assert run.last_step() == 2
    folder = begin(tmp_path, 2)
    assert run.saving() == 2
    publish(folder, {"step": 2, "files": {}})
    assert (run.newest(), run.saving()) == (2, 0)


def test_differences_name_the_tensors_whose_bits_differ(tmp_path):
    ours, theirs, same = (save(tmp_path / name, 1, value) for name, value in (("a", 0.0), ("b", -0.0), ("c", 0.0)))
    names = ["shard.safetensors", "state.json"]
    assert differences(ours, theirs, names) == ["shard.safetensors: w|weight|0"]
    assert differences(ours, same, names) == []


def test_a_checkpoint_that_is_gone_damaged_or_different_is_found(tmp_path):
    soak = Soak(EVERY_STEP, 1, 0, tmp_path, inputs=None)
    run = RunFolder(tmp_path / "run")
    for step in (1, 2):
        save(soak.whole.path, step)
        save(run.path, step)
    blow = next(blow for blow in blows(0, 20) if blow.kind == "kill")

    def judge(known):
        return soak.judge(run, blow, known, [-9] * 4, "", False).problems

    assert judge(known=2) == []
    assert judge(known=3) == ["LOST: the newest checkpoint is of step 2, and 3 was complete"]
    (run.checkpoint(1) / "state.json").write_text("{}")
    assert "state.json has 2 bytes" in judge(known=2)[0]
    save(run.path, 3, value=2.0)
    save(soak.whole.path, 3)
    assert judge(known=3)[1] == "checkpoint 3 differs from the undisturbed run's: shard.safetensors: w|weight|0"


@pytest.mark.parametrize(
    ("kind", "codes", "said", "is_fine"),
    [
        ("kill", [1, -9, 1, 1], "Traceback", True),
        ("stop", [85] * 4, "saved step 3", True),
        ("stop", [1, 1, 1, 1], "", False),
        ("full disk", [2, -9, -9, -9], "the disk is full", True),
        ("full disk", [1, -9, -9, -9], "Traceback", False),
    ],
)
def test_an_attempt_must_end_as_what_happened_to_it_says(kind, codes, said, is_fine):
    blow: Blow = next(blow for blow in blows(0, 20) if blow.kind == kind)
    assert (blow.check(codes, said) == []) == is_fine


def test_the_table_counts_what_was_lost_and_names_it():
    good = Result(arm=EVERY_STEP, steps=9, outcomes=[OUTCOME, OUTCOME], ends=[[], []], failures=[])
    assert good.is_clean
    assert "2 kills, 0 checkpoints lost, 2 of 2 runs ended" in report([good], 0, 60.0)
    assert "Not as it should be" not in report([good], 0, 60.0)
    lost = Outcome(**{**vars(OUTCOME), "problems": ["LOST: step 2"]})
    bad = Result(arm=EVERY_STEP, steps=9, outcomes=[OUTCOME, lost], ends=[["shards/0: w|weight|0"]], failures=["fell"])
    assert not bad.is_clean
    text = report([bad], 0, 60.0)
    assert "2 kills, 1 checkpoints lost, 0 of 1 runs ended" in text
    assert all(word in text for word in ("- LOST: step 2", "- fell", "- at the end of a run: shards/0: w"))


def test_the_run_is_the_hierarchical_one_for_few_tokens(tmp_path):
    inputs = make_inputs(tmp_path / "inputs", seed=0)
    config = json.loads((tmp_path / "inputs/ds_config.json").read_text())
    assert config["gradient_compression"]["type"] == "powersgd"
    assert config["hierarchical_sharding"] == {"machine_size": 2}
    assert config["mixed_precision"] == {"master_weights": False}
    assert config["optimizer"]["type"] == "CompactAdamW"
    command = inputs.command(tmp_path / "run", steps=5, save_every=1, keep=2)
    assert command[0] == "train-prior"
    assert command[command.index("--resume") + 1] == "auto"


@pytest.mark.slow
def test_a_run_that_each_kind_happened_to_ends_as_if_nothing_had(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/soak.py", "--quick", "--out", tmp_path / "table.md"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text()
    assert "0 checkpoints lost, 1 of 1 runs ended as the undisturbed run, bit for bit" in table
    assert "Not as it should be" not in table
