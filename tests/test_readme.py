"""The README is true: its commands run, one after the other as they stand, with flags appended that make them small."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL_DVAE, SMALL_PRIOR
from helpers import free_port

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL = {
    "make-scenes": ["--n_train", "60", "--n_validation", "0", "--n_held_out", "10", "--image_size", "32"],
    "train-tokenizer": ["--vocab_size", "400"],
    "launch/train_dvae.py": SMALL_DVAE,
    "launch/train_prior.py": SMALL_PRIOR,
    "filter": ["--min_side", "32"],
    "sample": ["--n", "1"],
    "evaluate": ["--n", "4"],
}
TIMEOUT = 120  # seconds


def read_commands():
    """The lines of fenced blocks that start one of our programs."""
    blocks = re.findall(r"^```\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("dalle-ds ", "deepspeed ", "python "))]


def make_small(line):
    """The command as a list, by this Python, with the flags that make it small."""
    words = shlex.split(line)
    extra = next((flags for name, flags in SMALL.items() if name in words), [])
    if words[0] == "dalle-ds":
        words = [sys.executable, "-m", "dalle_ds.cli", *words[1:]]
    elif words[0] == "deepspeed":
        words = [str(Path(sys.executable).parent / "deepspeed"), "--master_port", str(free_port()), *words[1:]]
    return [*words, *map(str, extra)]


@pytest.mark.slow
def test_the_commands_for_your_own_data_run_one_after_the_other(tmp_path):
    for name in ("launch", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = read_commands()
    assert len(commands) == 17
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    for line in commands:
        done = subprocess.run(
            make_small(line),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert (tmp_path / "pictures" / "grid.png").exists()
    assert (tmp_path / "runs" / "prior" / "report.html").exists()


def test_every_file_that_is_named_exists():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(
        r"`((?:ds_configs|launch)/[\w./]+)`", README
    ):
        assert (ROOT / path).exists(), path
