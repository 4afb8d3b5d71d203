"""metrics.jsonl, means over ranks, and the progress line."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from helpers import run_distributed

from dalle_ds.training.metrics import MetricsLog, TrainingProgress, read_metrics, training_progress


def test_lines_carry_step_kind_time_and_values(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, "train", {"loss": 2.0})
    log.write(1, "validation", {"loss": 3.0})
    first, second = read_metrics(log.path)
    assert (first["step"], first["kind"], first["loss"]) == (1, "train", 2.0)
    assert (second["kind"], second["loss"]) == ("validation", 3.0)
    assert 0 <= first["time"] <= second["time"] < 60


def test_a_resumed_run_drops_the_lines_that_come_again_and_its_clock_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "kind": "train", "time": 100.0 * step}) + "\n" for step in (1, 2, 3))
    )
    log = MetricsLog(path, resume_step=2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    log.write(3, "train", {})
    assert read_metrics(path)[-1]["time"] == pytest.approx(200, abs=30)


def test_a_resumed_run_that_is_killed_at_once_has_its_earlier_lines(tmp_path, monkeypatch):
    """Bug: the file was emptied before its lines were written again."""

    def stop(*_):
        raise KeyboardInterrupt

    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write(1, "train", {"loss": 2.0})
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(path, resume_step=1)
    assert [line["loss"] for line in read_metrics(path)] == [2.0]


def test_a_run_that_begins_leaves_nothing_of_an_earlier_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    MetricsLog(path)
    assert read_metrics(path) == []


def test_a_line_cut_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def mean_of_ranks():
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.metrics import mean_over_ranks

    rank = int(os.environ["RANK"])
    with process_group():
        return mean_over_ranks([{"loss": torch.tensor(10.0 * rank + i), "kl": torch.tensor(i)} for i in range(3)])


def test_means_are_over_batches_and_ranks(tmp_path):
    by_rank = run_distributed(mean_of_ranks, 2)
    assert by_rank[0] == by_rank[1] == {"loss": 6.0, "kl": 1.0}


def test_progress_is_plain_lines_where_there_is_no_terminal_and_not_at_every_step(capsys):
    with training_progress("prior", 4, 0, shown=True) as progress:
        for step in range(1, 5):
            progress.update(step, 0.5, 1234.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, "the first and the last, as all is done in far less than ten seconds"
    assert lines[-1].startswith("prior  step 4/4  loss 0.5000  1,234.5 images/s")


def test_the_time_left_counts_the_steps_of_this_session_alone(capsys):
    progress = TrainingProgress("prior", 110, 90)
    progress.began = time.time() - 10
    progress.update(100, 0.5, 1.0)
    assert capsys.readouterr().err.endswith("10 s left\n")


def test_other_ranks_show_nothing(capsys):
    with training_progress("prior", 4, 0, shown=False) as progress:
        assert progress is None
    assert capsys.readouterr().err == ""
