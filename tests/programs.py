"""Programs started as a user would start them, and what they leave in a run folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import free_port, read_weights

ROOT = Path(__file__).parents[1]
TIMEOUT = 180  # seconds, of which a command here takes ten
LIMIT = 120  # seconds that a run may need to begin, or to end, on a busy machine


def environment():
    """For programs that need not find an installed package, nor a GPU."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def start(*command):
    """Runs a program as a user would, on the CPU, and returns what it printed."""
    return run_program(command, environment())


def run_program(command, env, timeout=TIMEOUT):
    """Runs a program to its good end, and returns what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def launcher(n):
    """The deepspeed launcher with n processes, on a port of its own."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    return [deepspeed, "--quiet", "--master_port", free_port(), "--num_accelerators", n]


class Ranks:
    """A command on ranks of its own, without a launcher, so that each can be signalled or may hang by itself."""

    def __init__(self, command, world_size):
        self.ranks = [
            subprocess.Popen(
                [str(part) for part in command],
                env={**environment(), **variables},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for variables in rank_variables(world_size)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for rank in self.ranks:
            rank.kill()
            rank.communicate()

    def ended(self, but=None):
        """The exit codes and what was said, by rank, of all but one."""
        ending = [rank for number, rank in enumerate(self.ranks) if number != but]
        said = [rank.communicate(timeout=LIMIT)[0] for rank in ending]
        return [rank.returncode for rank in ending], said


def rank_variables(world_size):
    """What a launcher would tell each of `world_size` processes, by rank, on a free port."""
    group = {"WORLD_SIZE": world_size, "LOCAL_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, **group} for rank in range(world_size)]
    return [{name: str(value) for name, value in variables.items()} for variables in ranks]


# --- what they leave --------------------------------------------------------------------------------------------------


def read_json(path):
    return json.loads(Path(path).read_text())


def read_lines(run, kind):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def assert_same_weights(first, second):
    weights, others = read_weights(first), read_weights(second)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert tensor.equal(others[name]), name
