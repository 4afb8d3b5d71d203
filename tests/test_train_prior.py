"""Training the prior: its learning rate follows the loss, its weights are averaged, and a stop changes neither."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import CONFIGS, refusal, run_here, run_in_ranks
from helpers import call_commands, read_weights, run_distributed
from PIL import Image

from dalle_ds.config import InputError
from dalle_ds.storage.folders import complete_checkpoints

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
    for averaged in (False, True):
        first, second = (read_weights(run, averaged=averaged) for run in (whole, broken))
        assert first.keys() == second.keys()
        assert all(tensor.equal(second[key]) for key, tensor in first.items()), averaged
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
    averaged, last = (read_weights(whole, averaged=averaged) for averaged in (True, False))
    assert averaged.keys() == last.keys()
    assert not all(tensor.equal(last[name]) for name, tensor in averaged.items())


@pytest.mark.slow
def test_a_halving_by_hand_comes_again_where_a_run_dies_before_its_next_checkpoint(chain, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_in_ranks(1, *(chain.train_prior(run, "--loop.steps", 2) for run in (whole, broken)))
    for run in (whole, broken):
        run_here("halve-learning-rate", run)
    run_in_ranks(
        1,
        chain.train_prior(whole, "--loop.steps", 6, "--resume", "auto"),
        chain.train_prior(broken, "--loop.steps", 4, "--resume", "auto"),
    )
    shutil.rmtree(broken / "checkpoints/step-00000004")
    run_in_ranks(1, chain.train_prior(broken, "--loop.steps", 6, "--resume", "auto"))
    first, second = read_weights(whole), read_weights(broken)
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    for run in (whole, broken):
        assert [(line["step"], line["by"]) for line in lines_of(run, "halving")] == [(3, "hand")]
    rates = [line["learning_rate"] for line in lines_of(broken, "train")]
    assert [rate / rates[0] for rate in rates] == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5], rel=1e-3)  # of a slow cosine


@pytest.fixture(scope="module")
def far_from_its_average(chain, tmp_path_factory):
    """A run whose average stays near the first weights, whose logits are all 0, and its last ones are far away.

    Two imports of it have the one and the other alone.
    """
    folder = tmp_path_factory.mktemp("averaged")
    run_in_ranks(1, chain.train_prior(folder / "run", "--averaging", 0.9, "--averaging_every", 40, "--loop.steps", 40))
    for name, flags in (("averaged", []), ("last", ["--last_weights"])):
        run_here("export", folder / "run", "--out", folder / f"exported-{name}", *flags)
        run_here("import-model", folder / f"exported-{name}", "--out", folder / name, "--dvae", chain / "dvae")
    return folder


def train_without_pictures(command):
    """Runs the command; no picture can be drawn."""
    from dalle_ds.commands import train_prior

    def fail(model, path):
        raise InputError(f"{path}: no picture")

    make_stage = train_prior.make_stage
    train_prior.make_stage = lambda *args, **settings: replace(make_stage(*args, **settings), sample=fail)
    return call_commands(command)


@pytest.mark.slow
def test_what_fails_at_the_end_of_a_run_takes_no_checkpoint_with_it(chain, tmp_path):
    """With one save, at the end: a run of days."""
    run = tmp_path / "run"
    command = chain.train_prior(run, "--loop.steps", 3, "--loop.save_every", 0)
    [[(code, _, err)]] = run_distributed(train_without_pictures, 1, command)
    assert code == 2
    assert "no picture" in err
    assert [path.name for path in complete_checkpoints(run)] == ["step-00000003"]


@pytest.mark.slow
def test_sampling_takes_the_average_unless_the_last_weights_are_asked_for(far_from_its_average, tmp_path):
    def draw(run, *flags):
        out = tmp_path / "-".join([run, *flags])
        run_here("sample", "a red circle", "--prior", far_from_its_average / run, "--out", out, "--n", 2, *flags)
        return np.asarray(Image.open(out / "grid.png"))

    assert (draw("run") == draw("averaged")).all()
    assert (draw("run", "--last_weights") == draw("last")).all()
    assert not (draw("averaged") == draw("last")).all()


@pytest.mark.slow
def test_evaluation_takes_the_average_unless_the_last_weights_are_asked_for(chain, far_from_its_average):
    def draw(run, *flags):
        data = ["--data", chain / "scenes/held_out", "--n", 4, "--n_shown", 4]
        run_here("evaluate", "--prior", far_from_its_average / run, *data, *flags)
        files = sorted((far_from_its_average / run / "evaluation").iterdir())
        return np.stack([np.asarray(Image.open(file)) for file in files])

    assert (draw("run") == draw("averaged")).all()
    assert (draw("run", "--last_weights") == draw("last")).all()
    assert not (draw("averaged") == draw("last")).all()


# --- weights of another run -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_may_begin_at_imported_weights_under_zero_3(chain, far_from_its_average, tmp_path, world_size):
    """By steps of next to nothing: the peak is reached after a million."""
    start = ["--init_from", far_from_its_average / "averaged", "--loop.steps", 2, "--schedule.lr_warmup_steps", 10**6]
    run = tmp_path / "run"
    run_in_ranks(world_size, chain.train_prior(run, *start))
    given, weights = read_weights(far_from_its_average / "averaged"), read_weights(run)
    assert weights.keys() == given.keys()
    for name, tensor in weights.items():
        assert (tensor - given[name]).abs().max() < 1e-6, name
    # It goes on from its own checkpoint.
    run_in_ranks(world_size, chain.train_prior(run, *start, "--loop.steps", 3, "--resume", "auto"))
    assert [line["step"] for line in lines_of(run, "train")] == [1, 2, 3]


@pytest.mark.slow
def test_weights_of_another_model_or_of_other_tokens_are_refused(chain, far_from_its_average, tmp_path, capsys):
    imported = far_from_its_average / "averaged"
    start, out = ["--init_from", imported], tmp_path / "run"
    said = refusal(capsys, *chain.train_prior(out, *start, "--model.n_layer", 3))
    assert f"--init_from {imported} is another model: pass --model.n_layer 2" in said
    assert "is no run folder" in refusal(capsys, *chain.train_prior(out, "--init_from", tmp_path))
    assert "holds a dvae" in refusal(capsys, *chain.train_prior(out, "--init_from", chain / "dvae"))
    other = tmp_path / "other.model"
    run_here("train-tokenizer", "--data", chain / "scenes/held_out", "--out", other, "--vocab_size", 380)
    said = refusal(capsys, *chain.train_prior(out, *start, tokenizer=other))
    assert "was trained with another --tokenizer: use those it had" in said
    assert not out.exists()


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
