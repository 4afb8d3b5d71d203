"""The benchmark of PowerSGD runs, its gate holds, and its table names all contenders."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_quick_run_passes_the_gate_and_prints_ratios():
    command = [sys.executable, "benchmarks/powersgd.py", "--quick", "--clock", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("ours, float32", "ours, factors and errors in 1-6-9", "torch's hook"):
        assert f"| {name} | " in done.stdout
    assert "Target: at most 1.0 over torch's." in done.stdout
