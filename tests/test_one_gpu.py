"""The benchmark of one GPU runs where there is none, in small, and holds what the planner says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_quick_run_holds_the_bytes_of_the_plan():
    command = [sys.executable, "benchmarks/one_gpu.py", "--quick", "--steps", "2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    held, planned = re.findall(r"\| ([\d.]+) MB \|", done.stdout)
    assert held == planned
    assert "| updates skipped | 0 |" in done.stdout
