"""launch/slurm under a real SLURM, two nodes on this machine: jobs that are pre-empted and go on, and a cancelled one.

Needs slurmctld, slurmd and munge (Debian: apt install slurm-wlm munge), and root, as slurmd does.
"""

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from helpers import free_port
from programs import LIMIT, ROOT, assert_same_weights, environment, read_lines, run_program
from test_preemption import STEPS, Run, last_step, small_batches

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed here: no {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd runs as root"),
]

FEWER_STEPS = 40  # of four processes on two cores
# Two partitions over the same nodes: a job in `high` has those in `main` signalled, and requeued at most 30 s later.
# cred_expire: SLURM leaves a requeued job alone for as long as its old credentials hold.
CONFIG = """
ClusterName=dalle
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=30
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs=2 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Daemons of a cluster in a folder; `down` ends them by the numbers in their pid files."""

    def __init__(self, folder):
        self.folder = folder
        self.env = {**environment(), "SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
        self.env |= {"PYTHON": sys.executable}

    def up(self):
        folder, ports = self.folder, [free_port() for _ in range(3)]
        names = dict(zip(("port", "first_port", "second_port"), ports, strict=True))
        text = CONFIG.format(host=socket.gethostname().partition(".")[0], folder=folder, **names)
        (folder / "slurm.conf").write_text(text)
        for name in ("state", "spool.n1", "spool.n2"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(1024))
        files = {"socket": "munge.sock", "key-file": key.name, "pid-file": "munged.pid", "log-file": "munged.log"}
        files["seed-file"] = "munged.seed"
        self.call("munged", "--force", *(f"--{flag}={folder / name}" for flag, name in files.items()))
        self.call("slurmctld", "-c")
        for node in ("n1", "n2"):
            self.call("slurmd", "-N", node)
        self.wait_for(lambda: self.call("sinfo", "-h", "-t", "idle", "-p", "main", "-o", "%D").strip() == "2")

    def down(self):
        for name in ("slurmd.n1", "slurmd.n2", "slurmctld", "munged"):
            file = self.folder / f"{name}.pid"
            if file.exists():
                number = int(file.read_text())
                os.kill(number, signal.SIGTERM)
                self.wait_for(lambda: not Path(f"/proc/{number}").exists())  # noqa: B023

    def call(self, *command):
        """What a program of SLURM says."""
        return run_program(command, self.env, LIMIT)

    def wait_for(self, condition):
        deadline = time.monotonic() + LIMIT
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(path.read_text()[-3000:] for path in self.folder.glob("*.log")))
            time.sleep(0.1)

    def submit(self, *arguments):
        return self.call("sbatch", "--parsable", *arguments).strip()

    def state(self, job):
        return re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def submit_prior(cluster, chain, out, *options, steps=STEPS):
    """launch/slurm/train_prior.sbatch on two nodes without GPUs, one task each; its log is OUT.log."""
    sizes = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", f"--output={out}.log"]
    flags = chain.train_prior(out, "--deepspeed_config", small_batches(chain.root), "--loop.steps", steps)[1:]
    return cluster.submit(*sizes, *options, ROOT / "launch/slurm/train_prior.sbatch", *flags)


def saved_steps(log):
    return [int(step) for step in re.findall(r"saved step (\d+); go on with --resume auto", log)]


def test_a_job_that_is_pre_empted_twice_ends_with_the_weights_of_an_undisturbed_run(cluster, chain, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    log = Path(f"{out}.log")
    job = submit_prior(cluster, chain, out)
    cluster.wait_for(lambda: last_step(out) >= 3)
    # What SLURM itself does before the time limit (--signal=B:USR1@120).
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(lambda: len(saved_steps(log.read_text())) == 1)
    [first] = saved_steps(log.read_text())
    cluster.wait_for(lambda: last_step(out) >= first + 3)
    # A job of higher priority that needs both nodes.
    whole_cluster = ["--partition=high", "--nodes=2", "--exclusive"]
    urgent = cluster.submit(*whole_cluster, f"--output={tmp_path}/high.log", "--wrap=true")
    cluster.wait_for(lambda: cluster.state(urgent) == "COMPLETED")
    cluster.wait_for(lambda: cluster.state(job) in ("COMPLETED", "FAILED"))
    said = log.read_text()
    assert cluster.state(job) == "COMPLETED", said
    assert "Restarts=2" in cluster.call("scontrol", "show", "job", job)
    first, second = saved_steps(said)
    assert first < second < STEPS
    assert f"steps {second + 1} to {STEPS} in" in said
    with Run(chain, whole) as run:
        run.wait_for_step(1)
        assert run.ended()[0] == [0, 0]
    lines = read_lines(out, "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in read_lines(whole, "train")]
    assert_same_weights(whole, out)


def test_a_job_that_is_cancelled_saves_and_stays_cancelled(cluster, chain, tmp_path):
    job = submit_prior(cluster, chain, tmp_path / "out")
    cluster.wait_for(lambda: last_step(tmp_path / "out") >= 3)
    cluster.call("scancel", job)
    cluster.wait_for(lambda: len(saved_steps((tmp_path / "out.log").read_text())) == 1)
    cluster.wait_for(lambda: cluster.call("squeue", "-h") == "")
    assert cluster.state(job) == "CANCELLED"
    assert list((tmp_path / "out").glob("checkpoints/step-*/complete.json"))


@pytest.mark.parametrize("way", ["one-task-a-gpu", "torchrun"])
def test_four_processes_on_two_nodes_are_pre_empted_and_go_on(cluster, chain, tmp_path, monkeypatch, way):
    """Two tasks a node, each with its rank from SLURM; or one task a node, which starts two processes."""
    options = ["--ntasks-per-node=2"]
    if way == "torchrun":
        options = ["--cpus-per-task=2"]
        monkeypatch.setitem(cluster.env, "N_PROCESSES", "2")
    out, log = tmp_path / "out", tmp_path / "out.log"
    job = submit_prior(cluster, chain, out, *options, steps=FEWER_STEPS)
    cluster.wait_for(lambda: last_step(out) >= 3)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(lambda: cluster.state(job) in ("COMPLETED", "FAILED"))
    said = log.read_text()
    assert cluster.state(job) == "COMPLETED", said
    assert "Restarts=1" in cluster.call("scontrol", "show", "job", job)
    assert json.loads((out / "config.json").read_text())["world_size"] == 4
    [saved] = saved_steps(said)
    assert f"steps {saved + 1} to {FEWER_STEPS} in" in said
    assert [line["step"] for line in read_lines(out, "train")] == list(range(1, FEWER_STEPS + 1))
