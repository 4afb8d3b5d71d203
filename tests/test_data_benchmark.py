"""The benchmark of the data path runs, and reads as many samples with every contender."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_quick_run_prints_a_ratio_for_each_claim(tmp_path):
    command = [sys.executable, "benchmarks/data.py", "--quick", "--out", tmp_path / "data.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "data.md").read_text()
    for heading in ("## Streaming", "## Decoding", "## Token shards"):
        assert heading in table
    assert "| dalle-ds, samples |" in table
