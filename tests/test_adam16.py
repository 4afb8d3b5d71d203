"""The benchmark of the 16-bit optimizer runs, its gate holds, and its table has the bytes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_quick_run_passes_the_gate_and_prints_bytes_and_ratios():
    command = [sys.executable, "benchmarks/adam16.py", "--quick", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| torch AdamW, fused | 4 | 8 |" in done.stdout
    assert "| 16-bit moments | 4 | 4 |" in done.stdout
    assert "| 16-bit moments, float16 stochastic | 2 | 4 |" in done.stdout
    assert "| 16-bit moments, float16 kahan | 2 | 6 |" in done.stdout
