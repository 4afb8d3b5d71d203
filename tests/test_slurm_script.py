"""launch/slurm/run.bash with stand-ins for SLURM's programs: which exit codes it turns into a requeue."""

import os
import signal
import subprocess
import time

import pytest
from programs import ROOT

PROGRAMS = {
    # One line of what it was called with, then what the case says; SIGUSR1 ends it as it ends torchrun.
    "srun": """
        trap "exit 1" USR1
        echo "srun $*" >> "$CALLS"
        for i in $(seq "$TENTHS"); do sleep 0.1; done
        exit "$CODE"
    """,
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; if [ "$1" = show ]; then echo first; echo second; fi',
    "squeue": 'if [ "$BUSY" ] && [ ! -e "$CALLS.busy" ]; then touch "$CALLS.busy"; exit 1; fi; echo "$STATE"',
}
JOB = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "first,second",
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "2",
    "SLURM_CPUS_PER_TASK": "3",
}


class Script:
    """run.bash with `code` as what srun ends with, after some tenths of a second, and `state` as that of the job."""

    def __init__(self, folder, code=0, state="RUNNING", tenths=0, flags=(), busy="", **job):
        self.calls = folder / "calls"
        self.calls.touch()
        for name, text in PROGRAMS.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)
        names = {"CALLS": self.calls, "CODE": code, "STATE": state, "TENTHS": tenths, "BUSY": busy}
        env = {**os.environ, **JOB, **job, **{name: str(value) for name, value in names.items()}}
        env["PATH"] = f"{folder}:{env['PATH']}"
        command = ["bash", ROOT / "launch/slurm/run.bash", "launch/train_prior.py", *flags, "--out", "a run"]
        self.process = subprocess.Popen(command, env=env, cwd=ROOT)

    def ended(self):
        code = self.process.wait(timeout=60)
        return code, [line for line in self.calls.read_text().splitlines() if "requeue" in line]


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (0, "RUNNING", False),
        (85, "RUNNING", True),
        (85, "COMPLETING", False),  # cancelled, or about to be requeued
        (85, "", False),
        (1, "RUNNING", False),
        (2, "RUNNING", False),
        (137, "RUNNING", False),
    ],
)
def test_a_job_is_requeued_when_it_saved_because_somebody_asked_and_slurm_lets_it_run(tmp_path, code, state, requeued):
    expected = ["scontrol requeue 12345"] if requeued else []
    assert Script(tmp_path, code, state).ended() == (code, expected)


@pytest.mark.slow
def test_a_controller_that_is_busy_is_asked_again(tmp_path):
    assert Script(tmp_path, 85, busy="yes").ended() == (85, ["scontrol requeue 12345"])


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGUSR1, (1, ["scontrol requeue 12345"])), (signal.SIGTERM, (0, []))]
)
def test_the_script_hands_on_the_signal_to_stop_and_outlives_both(tmp_path, number, expected):
    script = Script(tmp_path, tenths=100 if number == signal.SIGUSR1 else 10)
    while "srun" not in script.calls.read_text():
        time.sleep(0.01)
    script.process.send_signal(number)
    assert script.ended() == expected


def test_one_task_a_gpu_gets_its_rank_from_slurm_and_one_task_a_node_gets_torchrun(tmp_path):
    Script(tmp_path).ended()
    plain = tmp_path / "calls"
    assert "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec" in plain.read_text()
    assert plain.read_text().rstrip().endswith("task launch/train_prior.py --out a run")
    Script(tmp_path, SLURM_GPUS_ON_NODE="8").ended()
    assert "-m torch.distributed.run --nnodes" in plain.read_text()


def test_the_first_rank_may_stay_to_copy_its_last_checkpoint(tmp_path):
    Script(tmp_path).ended()
    assert "--wait=60 bash" in (tmp_path / "calls").read_text()
    Script(tmp_path, flags=["--loop.upload", "s3://weights/a"]).ended()
    assert "--wait=3600 bash" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("stage", ["dvae", "prior"])
def test_both_stages_share_the_script_and_ask_for_a_signal_in_time(stage):
    text = (ROOT / f"launch/slurm/train_{stage}.sbatch").read_text()
    assert f"bash launch/slurm/run.bash launch/train_{stage}.py --resume auto" in text
    assert {"#SBATCH --signal=B:USR1@120", "#SBATCH --requeue"} <= set(text.splitlines())
