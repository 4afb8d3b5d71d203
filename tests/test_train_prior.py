"""Training the prior: its learning rate follows the loss, its weights are averaged, and a stop changes neither."""

import json

import numpy as np
import pytest
from conftest import CONFIGS, run_here, run_in_ranks
from PIL import Image
from safetensors.torch import load_file

# Windows of two steps, of which only one that halves the loss is good: halved after steps 4 and 6.
PLATEAU = {
    "--schedule.lr_rule": "plateau",
    "--schedule.plateau_window": 2,
    "--schedule.plateau_improvement": 0.5,
    "--schedule.plateau_patience": 1,
    "--averaging": 0.9,
    "--averaging_every": 2,
}
FLAGS = [word for item in PLATEAU.items() for word in item]


def lines_of(run, kind):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def newest(run, name):
    return sorted(run.glob(f"checkpoints/step-*/{name}"))[-1]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stop_within_a_window_and_between_updates_of_the_average_changes_nothing(chain, tmp_path, world_size):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_in_ranks(
        world_size,
        chain.train_prior(whole, *FLAGS, "--loop.steps", 7, "--loop.log_every", 3),
        chain.train_prior(broken, *FLAGS, "--loop.steps", 3),
        chain.train_prior(broken, *FLAGS, "--loop.steps", 7, "--resume", "auto"),
    )
    for name in ("model.safetensors", "averaged.safetensors"):
        first, second = load_file(newest(whole, name)), load_file(newest(broken, name))
        assert first.keys() == second.keys()
        assert all(tensor.equal(second[key]) for key, tensor in first.items()), name
    for run in (whole, broken):
        assert [(line["step"], line["by"], line["multiplier"]) for line in lines_of(run, "halving")] == [
            (4, "plateau", 0.5),
            (6, "plateau", 0.25),
        ]
    rates = [line["learning_rate"] for line in lines_of(broken, "train")]
    assert [rate / rates[0] for rate in rates] == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.25])
    state = json.loads(newest(whole, "state.json").read_text())["schedule"]
    assert state["n_halved"] == 2
    assert state["seen"][1] == world_size, "of the window that has begun, one step of each rank"
    averaged, last = (load_file(newest(whole, f"{name}.safetensors")) for name in ("averaged", "model"))
    assert averaged.keys() == last.keys()
    assert not all(tensor.equal(last[name]) for name, tensor in averaged.items())


@pytest.mark.slow
def test_sampling_takes_the_average_unless_the_last_weights_are_asked_for(chain, tmp_path):
    run = tmp_path / "run"
    # The average stays near the first weights, whose logits are all 0; the last ones are far away.
    run_in_ranks(1, chain.train_prior(run, "--averaging", 0.9, "--averaging_every", 40, "--loop.steps", 40))
    newest(run, "averaged.safetensors").replace(kept := tmp_path / "averaged.safetensors")
    drawn = {}
    for name, flags in (("without", []), ("last", ["--last_weights"]), ("averaged", [])):
        if name == "last":
            kept.replace(newest(run, "model.safetensors").with_name("averaged.safetensors"))
        run_here("sample", "a red circle", "--prior", run, "--out", tmp_path / name, "--n", 2, *flags)
        drawn[name] = np.asarray(Image.open(tmp_path / name / "grid.png"))
    assert (drawn["last"] == drawn["without"]).all()
    assert not (drawn["averaged"] == drawn["without"]).all()


@pytest.mark.slow
def test_histograms_and_scales_of_a_16_bit_run_count_every_gradient_and_are_on_its_page(chain, tmp_path):
    config = json.loads((CONFIGS / "cpu_zero3.json").read_text())
    config |= {"mixed_precision": {}, "resblock_gradient_scaling": {}, "fp16": {"enabled": True, "loss_scale": 1}}
    (tmp_path / "fp16.json").write_text(json.dumps(config))
    run = tmp_path / "run"
    command = chain.train_prior(run, "--histogram_every", 2, "--loop.steps", 5, "--averaging", 0.9)
    command[command.index("--deepspeed_config") + 1] = tmp_path / "fp16.json"
    run_in_ranks(2, command)
    lines = [json.loads(line) for line in (run / "histograms.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    n_parameters = json.loads((run / "config.json").read_text())["n_parameters"]
    for line in lines:
        counted = sum(sum(row["counts"]) + row["zeros"] + row["nonfinite"] for row in line["kinds"].values())
        assert counted == n_parameters, "each rank counts its shard"
        assert len(line["resblocks"]) == 4
        assert set(line["kinds"]) >= {"attention matrices", "MLP matrices", "gains", "biases", "embeddings"}
    last = lines_of(run, "train")[-1]
    assert len(last["gradient_scales"]) == len(last["nonfinite_events"]) == 4
    run_here("report", run)
    page = (run / "report.html").read_text()
    for title in ("Gradient scales", "Gradients by kind", "Gradients by resblock", "Skipped updates"):
        assert title in page, title
