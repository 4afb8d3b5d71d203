"""train-dvae: schedules, validation, every ZeRO stage and precision, any micro-batch, going on as if never stopped."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import run_here, run_in_ranks
from helpers import read_weights
from programs import read_lines

from dalle_ds.cli import main
from dalle_ds.commands.train_dvae import make_stage, noise_seeds
from dalle_ds.config import DataConfig, DVAETraining, stretched
from dalle_ds.models.weights import load_dvae
from dalle_ds.presets import PRESETS
from dalle_ds.training.distributed import Ranks

VOCAB_SIZE, VALUES_PER_CELL = 32, 3 * 8 * 8
MODEL = {"image_size": 32, "n_hid": 8, "n_init": 16, "vocab_size": VOCAB_SIZE, "n_blk_per_group": 1}
FLAGS = [f"--model.{name}={value}" for name, value in MODEL.items()] + [
    "--schedule.warm_start_steps=0",
    "--schedule.lr_warmup_steps=0",
    "--loop.log_every=1",
    "--loop.validation_batches=2",
    "--averaging=0.9",
]
# The same sums in another order, in float32, through a few steps of Adam at its first, largest, step sizes.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4
# Of a loss in 16 bits against float32: significands of 11 and 8 bits, and gradients cut to them in three updates.
HALF_TOLERANCE = {"fp32": LOSS_TOLERANCE, "fp16": 5e-3, "bf16": 5e-2}

NORM_TOLERANCE = (
    0.1  # of the norm of gradients that bf16 has rounded to 8 bits; a loss scale left in is a factor of 256
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    sizes = ["--image_size", 32, "--n_train", 60, "--n_validation", 20, "--n_held_out", 8, "--samples_per_shard", 20]
    run_here("make-scenes", folder, *sizes)
    return folder


@pytest.fixture
def train(scenes, tmp_path):
    """(name of a run, its flags) -> the command line that trains it, under a DeepSpeed JSON of its own."""

    def command(name, *flags, stage=0, precision="fp32", batch=4, accumulation=1):
        config = {
            "train_micro_batch_size_per_gpu": batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 5.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": stage},
        }
        if precision != "fp32":
            config[precision] = {"enabled": True}
        if precision == "fp16":
            config["fp16"] |= {"loss_scale": 0, "initial_scale_power": 8}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config))
        data = ["--data.train", scenes / "train", "--data.validation", scenes / "validation"]
        return ["train-dvae", "--deepspeed_config", path, "--out", tmp_path / name, *data, *FLAGS, *flags]

    return command


def losses(run, kind="train"):
    return [line["loss"] for line in read_lines(run, kind)]


def assert_close(weights, others, tolerance, what):
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=tolerance, msg=f"{what}: {name}")


# --- schedules --------------------------------------------------------------------------------------------------------


def stage_of(scenes, config, **changes):
    data = DataConfig(train=str(scenes / "train"), validation=str(scenes / "validation"))
    config = dataclasses.replace(config, data=data, **changes)
    return make_stage(config, Ranks(0, 1, 0, torch.device("cpu")), scenes)


# Step -> KL weight, temperature and learning rate: start, middle and end of each schedule, and beyond (Appendix A.2).
PAPER = {
    0: (0.0, 1.0, 1e-4),
    2_500: (3.3, None, None),
    5_000: (6.6, None, None),
    75_000: (6.6, 0.53125, None),
    150_000: (6.6, 1 / 16, None),
    600_000: (6.6, 1 / 16, 5.0625e-5),
    1_200_000: (6.6, 1 / 16, 1.25e-6),
    2_999_999: (6.6, 1 / 16, 1.25e-6),
}


def test_by_default_training_follows_the_papers_schedules(scenes):
    config = DVAETraining()
    assert (config.flip, config.averaging, config.stretch) == (True, 0.999, 1.0)
    stage = stage_of(scenes, config)
    peak = json.loads((Path(__file__).parents[1] / "ds_configs/dvae_fp16.json").read_text())["optimizer"]["params"][
        "lr"
    ]
    for step, (kl_weight, temperature, rate) in PAPER.items():
        scalars = stage.scalars(step)
        assert scalars["kl_weight"] == pytest.approx(kl_weight, rel=1e-12)
        assert temperature is None or scalars["temperature"] == pytest.approx(temperature, rel=1e-12)
        assert rate is None or peak * stage.learning_rate.multiplier(step) == pytest.approx(rate, rel=1e-12)


def test_stretched_to_a_thousandth_each_step_has_the_values_of_the_thousandfold_step(scenes):
    paper = stage_of(scenes, DVAETraining())
    short = stage_of(scenes, stretched(DVAETraining(stretch=0.001)))
    for step in (*range(6), 75, 150, 600, 1_200, 3_000):
        for name, value in paper.scalars(1_000 * step).items():
            assert short.scalars(step)[name] == pytest.approx(value, rel=1e-12), (name, step)
        expected = paper.learning_rate.multiplier(1_000 * step)
        assert short.learning_rate.multiplier(step) == pytest.approx(expected, rel=1e-12), step


# --- validation -------------------------------------------------------------------------------------------------------


def test_every_validation_and_every_grid_sees_the_same_pictures(scenes):
    stage = stage_of(scenes, DVAETraining())
    first, second = (stage.open_validation(4) for _ in range(2))
    for _ in range(7):  # past the end of the 20 pictures
        assert (next(first)["image"] == next(second)["image"]).all()


@pytest.mark.parametrize(("n", "micro_batches"), [(8, 1), (4, 2), (2, 4)])
def test_noise_belongs_to_a_place_in_the_whole_batch_and_differs_from_place_to_place_and_step_to_step(n, micro_batches):
    seeds = [seed for micro_batch in range(micro_batches) for seed in noise_seeds(5, 7, micro_batch, n)]
    assert seeds == noise_seeds(5, 7, 0, 8)
    others = [noise_seeds(seed, step, 0, 8) for seed in range(5) for step in range(50)]
    assert len({seed for row in others for seed in row}) == 5 * 50 * 8


# --- training ---------------------------------------------------------------------------------------------------------

STAGES = [(stage, precision) for stage in (0, 1, 2) for precision in ("fp32", "fp16", "bf16")]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_it_trains_in_every_zero_stage_and_precision(train, tmp_path, world_size):
    steps = ["--loop.steps=6", "--stretch=0.5", "--loop.evaluate_every=1"]
    commands = [train(f"{stage}-{precision}", *steps, stage=stage, precision=precision) for stage, precision in STAGES]
    run_in_ranks(world_size, *commands)
    whole = tmp_path / "0-fp32"
    for stage, precision in STAGES:
        run, case = tmp_path / f"{stage}-{precision}", f"stage {stage}, {precision}"
        written = json.loads((run / "config.json").read_text())["config"]
        assert (written["loop"]["steps"], written["stretch"]) == (3, 0.5), "what ran, and the factor"
        for kind in ("train", "validation"):
            assert losses(run, kind) == pytest.approx(losses(whole, kind), abs=HALF_TOLERANCE[precision]), case
            for line in read_lines(run, kind):
                assert line["kl_per_cell"] == pytest.approx(VALUES_PER_CELL * line["kl"], rel=1e-5)
                assert 0 <= line["kl_per_cell"] <= math.log(VOCAB_SIZE)
        if (stage, precision) != (0, "fp32"):  # where DeepSpeed clips without telling the norm
            norms, true_norms = (
                [line["gradient_norm"] for line in read_lines(folder, "train")] for folder in (run, tmp_path / "1-fp32")
            )
            assert norms == pytest.approx(true_norms, rel=NORM_TOLERANCE), case
        assert losses(run, "validation")[-1] < losses(run, "validation")[0], case
        last, averaged = (read_weights(run, averaged=averaged) for averaged in (False, True))
        assert {tensor.dtype for tensor in [*last.values(), *averaged.values()]} == {torch.float32}
        assert not any(last[name].equal(averaged[name]) for name in last if name.endswith(".w")), case
        assert all(p.equal(averaged[name]) for name, p in load_dvae(run).state_dict().items())
        if precision == "fp32":
            assert_close(averaged, read_weights(whole, averaged=True), WEIGHT_TOLERANCE, case)


@pytest.mark.slow
def test_however_a_batch_is_cut_into_micro_batches_losses_and_averages_are_the_same(train, tmp_path):
    """One process: 8, 2 x 4 and 4 x 2 pictures. The reader hands out the same pictures and the noise is the same."""
    cuts = [(8, 1), (4, 2), (2, 4)]
    commands = [
        train(f"{b}x{a}", "--loop.steps=3", f"--checkpoint_activations={b == 2}", batch=b, accumulation=a, stage=a // 2)
        for b, a in cuts
    ]
    run_in_ranks(1, *commands)
    for batch, accumulation in cuts[1:]:
        run = tmp_path / f"{batch}x{accumulation}"
        assert losses(run) == pytest.approx(losses(tmp_path / "8x1"), abs=LOSS_TOLERANCE)
        averages = (read_weights(folder, averaged=True) for folder in (run, tmp_path / "8x1"))
        assert_close(*averages, WEIGHT_TOLERANCE, run.name)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stage", "precision"), [(1, 0, "fp32"), (2, 1, "fp16")], ids=str)
def test_a_run_that_goes_on_ends_with_the_average_of_an_unbroken_one_bit_for_bit(
    train, tmp_path, world_size, stage, precision
):
    how = {"stage": stage, "precision": precision}
    run_in_ranks(
        world_size,
        train("whole", "--loop.steps=4", **how),
        train("broken", "--loop.steps=2", **how),
        train("broken", "--loop.steps=4", "--resume=auto", **how),
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for averaged in (False, True):
        assert_close(*(read_weights(run, averaged=averaged) for run in (broken, whole)), 0, f"averaged {averaged}")
    assert losses(broken) == losses(whole)
    assert losses(broken, "validation")[-1] == losses(whole, "validation")[-1]


@pytest.mark.slow
def test_validation_is_by_the_averaged_parameters(train, scenes, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run_in_ranks(1, train("run", "--loop.steps=3"))
    [logged] = read_lines(run, "validation")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    tiny = PRESETS["tiny"].dvae
    stage = stage_of(scenes, tiny, model=dataclasses.replace(tiny.model, **MODEL))
    by_average, by_last = (
        stage.validate(load_dvae(run, averaged=averaged), stage.open_validation(4), 2, 3) for averaged in (True, False)
    )
    for name in ("loss", "reconstruction", "kl", "codebook_use", "codebook_perplexity"):
        assert logged[name] == pytest.approx(by_average[name], abs=LOSS_TOLERANCE), name
    assert logged["loss"] != pytest.approx(by_last["loss"], abs=LOSS_TOLERANCE)


# --- weights of another run -------------------------------------------------------------------------------------------


def test_training_may_start_from_the_weights_of_another_run_and_not_from_another_model(train, tmp_path, capsys):
    run_in_ranks(1, train("first", "--loop.steps=2"))
    start = f"--init_from={tmp_path / 'first'}"
    # Weights that hardly move: an average from the start on, by steps of next to nothing.
    run_in_ranks(1, train("second", "--loop.steps=1", "--schedule.lr_start_multiplier=1e-9", start))
    first = dict(load_dvae(tmp_path / "first").state_dict())
    assert_close(read_weights(tmp_path / "second"), first, 1e-6, "the first run's")
    assert main([str(word) for word in train("third", start, "--model.n_init=24")]) == 2
    assert "is another model: pass --model.n_init 16" in capsys.readouterr().err
    warm = "--schedule.warm_start_steps=2"
    assert main([str(word) for word in train("fourth", warm, stage=3)]) == 2
    assert "a warm start needs whole weights: use ZeRO stage 0, 1 or 2" in capsys.readouterr().err
