"""The benchmark of the dVAE's training step runs, and its gate holds: loss and gradients are those of the release."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_quick_run_passes_the_gate_and_prints_the_ratio():
    command = [sys.executable, "benchmarks/dvae_throughput.py", "--quick", "--threads", "1", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gate: loss and gradients equal those of the released modules" in done.stdout
    assert "| small | 1 |" in done.stdout
