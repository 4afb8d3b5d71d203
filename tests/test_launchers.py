"""Every way to start training gives the same losses, and each launcher hands a request to stop on in its own way."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import free_port
from programs import LIMIT, ROOT, environment, read_lines
from test_preemption import last_step, small_batches

BIN = Path(sys.executable).parent
SCRIPT = ROOT / "launch/train_prior.py"


def python():
    return [[sys.executable, SCRIPT]]


def deepspeed(n):
    return [[BIN / "deepspeed", "--quiet", "--master_port", free_port(), "--num_accelerators", n, SCRIPT]]


def torchrun(n, *flags):
    return [[BIN / "torchrun", "--nproc_per_node", n, "--master_port", free_port(), *flags, SCRIPT]]


def hostfile(folder):
    """Two machines of one process each, where deepspeed is started on each by hand and not over ssh."""
    file = folder / "hostfile"
    file.write_text("first slots=1\nsecond slots=1\n")
    common = [BIN / "deepspeed", "--quiet", "--hostfile", file, "--no_ssh", "--master_addr", "127.0.0.1"]
    common += ["--master_port", free_port()]
    return [[*common, "--node_rank", rank, SCRIPT] for rank in range(2)]


class Job:
    """The processes of one way to start, on the CPU; what is left of them is ended with it."""

    def __init__(self, commands, flags):
        self.processes = [
            subprocess.Popen(
                [str(part) for part in (*command, *flags)],
                env=environment(),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for command in commands
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            if process.poll() is None:
                for child in (*psutil.Process(process.pid).children(recursive=True), process):
                    child.kill()
            process.communicate()

    def ended(self):
        said = "".join(process.communicate(timeout=LIMIT)[0] for process in self.processes)
        return [process.returncode for process in self.processes], said


def flags_of(chain, out, *flags):
    return chain.train_prior(out, "--deepspeed_config", small_batches(chain.root), *flags)[1:]


@pytest.mark.slow
def test_every_way_to_start_gives_the_same_losses(chain, tmp_path):
    ways = {
        1: {"python": python(), "deepspeed": deepspeed(1)},
        2: {"deepspeed": deepspeed(2), "torchrun": torchrun(2), "hostfile": hostfile(tmp_path)},
    }
    for n, starts in ways.items():
        losses = {}
        for name, commands in starts.items():
            out = tmp_path / f"{name}{n}"
            with Job(commands, flags_of(chain, out)) as job:
                codes, said = job.ended()
            assert codes == [0] * len(commands), said
            losses[name] = [line["loss"] for line in read_lines(out, "train")]
            assert len(losses[name]) == 3
        assert all(found == losses["deepspeed"] for found in losses.values()), losses


def ranks_of(job):
    """The processes that train, under their launchers."""
    children = psutil.Process(job.processes[0].pid).children(recursive=True)
    return [child for child in children if any(part.startswith("--local_rank=") for part in child.cmdline())]


def signal_when_it_trains(job, out, send):
    """What the job ends with after `send(job)`, called at a step in its middle; and the step that it saved."""
    deadline = time.monotonic() + LIMIT
    while last_step(out) < 3:
        assert time.monotonic() < deadline
        assert job.processes[0].poll() is None, job.ended()
        time.sleep(0.02)
    send(job)
    [code], said = job.ended()
    step = last_step(out)
    assert f"saved step {step}; go on with --resume auto" in said
    assert (out / f"checkpoints/step-{step:08d}/complete.json").exists()
    return code


@pytest.mark.slow
def test_one_rank_that_is_asked_to_stop_ends_all_and_the_deepspeed_launcher_with_85(chain, tmp_path):
    out = tmp_path / "prior"
    with Job(deepspeed(2), flags_of(chain, out, "--loop.steps", "100000")) as job:
        assert signal_when_it_trains(job, out, lambda job: ranks_of(job)[1].send_signal(signal.SIGUSR1)) == 85


@pytest.mark.slow
def test_torchrun_hands_signals_on_to_its_ranks_and_waits_for_them(chain, tmp_path):
    out = tmp_path / "prior"
    start = torchrun(2, "--signals-to-handle", "SIGTERM,SIGUSR1", "--shutdown-timeout", "110")
    with Job(start, flags_of(chain, out, "--loop.steps", "100000")) as job:
        assert signal_when_it_trains(job, out, lambda job: job.processes[0].send_signal(signal.SIGUSR1)) == 1
