"""All of sixteen bits on one accelerator: a GPU where there is one, and the CPU, to see that the test itself holds."""

import json
import sys

import pytest
from helpers import read_weights
from programs import ROOT, environment, read_json, read_lines, run_program

STEPS = 6


def one_gpu(overlap):
    """ds_configs/one_gpu_fp16.json for a small batch in two micro-steps, with scales that are too high at first."""
    config = read_json(ROOT / "ds_configs/one_gpu_fp16.json")
    config |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "resblock_gradient_scaling": TOO_HIGH}
    config["zero_optimization"] |= {"overlap_comm": overlap}
    return config


TOO_HIGH = {"initial_scale": 2.0**40, "highest_scale": 2.0**40, "shrink": 2.0**16, "patience": 0}


@pytest.mark.parametrize(
    "accelerator", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_a_run_in_sixteen_bits_learns_what_float32_learns(chain, tmp_path, accelerator):
    """Streams, pinned copies, Triton kernels and histograms of one process; skipped updates come first."""
    full = one_gpu(overlap=False)
    for section in ("fp16", "mixed_precision", "resblock_gradient_scaling"):
        del full[section]
    runs = {"float32": ("cpu", full), "sixteen": (accelerator, one_gpu(overlap=accelerator == "cuda"))}
    lines = {}
    for name, (device, config) in runs.items():
        file, out = tmp_path / f"{name}.json", tmp_path / name
        file.write_text(json.dumps(config))
        flags = ["--loop.steps", STEPS, "--averaging", 0.5, "--averaging_every", 1]
        flags += ["--histogram_every", 1, "--data.validation", chain / "tokens/validation"] if name == "sixteen" else []
        command = [sys.executable, ROOT / "launch/train_prior.py", *chain.train_prior(out, *flags)[1:]]
        run_program([*command, "--deepspeed_config", file], {**environment(), "DS_ACCELERATOR": device})
        lines[name] = read_lines(out, "train")
    skipped = lines["sixteen"][-1]["skipped_updates"]
    assert 0 < skipped < STEPS - 2
    scales = lines["sixteen"][-1]["gradient_scales"]
    assert max(scales) < 2.0**40
    # A skipped update leaves the weights, so that losses come as many steps later; batches differ by a hair.
    after = [line["loss"] for line in lines["sixteen"][skipped:]]
    assert after == pytest.approx([line["loss"] for line in lines["float32"][: len(after)]], rel=0.02)
    assert after[-1] < after[0]
    histograms = (tmp_path / "sixteen/histograms.jsonl").read_text().splitlines()
    assert len(histograms) == STEPS
    counts = json.loads(histograms[-1])["kinds"]["MLP matrices"]
    assert sum(counts["counts"]) > 0 == counts["nonfinite"]
    averaged, last = (read_weights(tmp_path / "sixteen", averaged=averaged) for averaged in (True, False))
    assert not all(tensor.equal(last[name]) for name, tensor in averaged.items())
    assert all(tensor.isfinite().all() for tensor in averaged.values())
