"""The benchmark of one GPU runs where there is none, in small, and holds what the planner says."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from one_gpu import QUICK

from dalle_ds.planner import memory_of
from dalle_ds.planner.deepspeed_json import way_of
from dalle_ds.planner.ways import Layout
from dalle_ds.presets import PRESETS

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_quick_run_holds_the_bytes_of_the_plan():
    command = [sys.executable, "benchmarks/one_gpu.py", "--quick", "--steps", "2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    held, planned = re.findall(r"\| ([\d.]+) MB \|", done.stdout)
    assert held == planned
    # Beside the peak, which only a GPU tells, stands the planned one, of everything.
    [peak] = re.findall(r"\| most memory allocated \| nan GB \|\n\| the same, .* \| ([\d.]+) GB \|", done.stdout)
    config = replace(PRESETS["12b"].prior.model, text_vocab_size=64, image_vocab_size=64, **QUICK)
    way = way_of(json.loads((ROOT / "ds_configs/one_gpu_fp16.json").read_text()))
    memory = memory_of(config, way, Layout(n_gpus=1, machine_size=1))
    assert float(peak) == round(memory.total / 1e9, 4) > 0
    assert "| updates skipped | 0 |" in done.stdout
