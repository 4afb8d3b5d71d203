"""Every dataclass checks itself: a bad value raises InputError that names field and value."""

import dataclasses
import inspect

import pytest

from dalle_ds import config
from dalle_ds.config import (
    DataConfig,
    DVAEConfig,
    DVAEScheduleConfig,
    DVAETraining,
    InputError,
    LoopConfig,
    PriorConfig,
    PriorScheduleConfig,
    PriorTraining,
    SamplingConfig,
    SceneConfig,
    TokenizerConfig,
    stretched,
)

CONFIGS = [value for value in vars(config).values() if inspect.isclass(value) and dataclasses.is_dataclass(value)]
NAN = float("nan")

# Field -> values that must be refused.
BAD = {
    DVAEConfig: {
        "image_size": [0, -8, 100],
        "n_hid": [0, 6],
        "n_blk_per_group": [0],
        "n_init": [0],
        "vocab_size": [1, 65_537],
        "post_gain": [-0.1, NAN],
        "min_scale": [-0.1],
        "pool": ["mean"],
    },
    DVAETraining: {"stretch": [0.0, -1.0, NAN, float("inf")], "averaging": [-0.1, 1.0, NAN]},
    DVAEScheduleConfig: {
        "kl_weight": [-1.0, NAN],
        "temperature_start": [0.0],
        "temperature_end": [-0.1],
        "temperature_steps": [-1],
        "lr_warmup_steps": [-1],
        "lr_steps": [-1],
        "lr_final_multiplier": [-0.1, 1.5],
        "kl_weight_start": [-1.0],
        "kl_steps": [-1],
        "encoder_lr_multiplier": [0.0, -1.0],
        "lr_start_multiplier": [0.0],
        "warm_start_steps": [-1],
    },
    TokenizerConfig: {"vocab_size": [31], "dropout": [-0.1, 1.0]},
    PriorConfig: {
        "text_vocab_size": [0],
        "text_len": [1],
        "image_vocab_size": [0],
        "grid_size": [0],
        "n_layer": [0],
        "n_head": [0],
        "head_dim": [0],
        "conv_kernel": [10, 0, -1],
        "text_loss_weight": [-0.1, 1.1],
    },
    PriorScheduleConfig: {
        "lr_rule": ["linear"],
        "lr_warmup_steps": [-1],
        "lr_halvings": [-1],
        "plateau_window": [0],
        "plateau_improvement": [-0.1, 1.0, NAN],
        "plateau_patience": [0],
        "lr_steps": [-1],
        "lr_final_multiplier": [-0.1, 1.5],
    },
    PriorTraining: {"averaging": [-0.1, 1.0, NAN], "averaging_every": [0], "histogram_every": [-1]},
    DataConfig: {"shuffle_buffer": [0], "n_lanes": [0], "block_len": [0], "n_worker": [0]},
    LoopConfig: {
        "steps": [0],
        "seed": [-1],
        "log_every": [0],
        "evaluate_every": [-1],
        "sample_every": [-1],
        "save_every": [-1],
        "timeout_minutes": [0.0, -1.0, float("inf"), NAN],
        "keep": [0],
        "validation_batches": [0],
    },
    SamplingConfig: {"temperature": [-1.0, NAN], "top_k": [-1], "top_p": [0.0, 1.5], "batch_size": [0]},
    SceneConfig: {
        "image_size": [31],
        "n_train": [-1],
        "n_validation": [-1],
        "n_held_out": [-1],
        "samples_per_shard": [0],
        "image_format": ["bmp"],
        "two_object_fraction": [-0.1, 1.1],
    },
}


@pytest.mark.parametrize(
    ("config_type", "field", "value"),
    [
        pytest.param(config_type, field, value, id=f"{config_type.__name__}-{field}-{value}")
        for config_type, fields in BAD.items()
        for field, values in fields.items()
        for value in values
    ],
)
def test_a_bad_value_is_refused_in_one_line_with_field_and_value(config_type, field, value):
    with pytest.raises(InputError) as error:
        config_type(**{field: value})
    message = str(error.value)
    assert field in message
    assert str(value) in message
    assert "\n" not in message


@pytest.mark.parametrize("config_type", CONFIGS, ids=lambda t: t.__name__)
def test_every_config_stands_at_its_defaults_frozen_and_described(config_type):
    default = config_type()
    for field in dataclasses.fields(default):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(default, field.name, None)
        if not dataclasses.is_dataclass(getattr(default, field.name)):
            assert field.metadata.get("help"), field.name


def test_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


def test_the_papers_numbers_are_the_defaults():
    dvae, prior = DVAEConfig(), PriorConfig()
    assert (dvae.image_size, dvae.grid_size, dvae.vocab_size, dvae.n_hid, dvae.n_init) == (256, 32, 8192, 256, 128)
    assert (prior.dim, prior.image_len, prior.seq_len, prior.n_layer) == (3968, 1024, 1280, 64)
    assert (prior.text_vocab_size, prior.text_len, prior.text_loss_weight) == (16_384, 256, 1 / 8)
    schedule = DVAEScheduleConfig()
    assert (schedule.kl_weight, schedule.temperature_end, schedule.temperature_steps) == (6.6, 1 / 16, 150_000)
    assert (schedule.lr_steps, schedule.lr_final_multiplier) == (1_200_000, 1 / 80)
    assert TokenizerConfig().dropout == 0.1


def test_stretching_multiplies_every_number_of_steps_and_nothing_else():
    config = DVAETraining(
        stretch=0.001, schedule=DVAEScheduleConfig(lr_warmup_steps=300), loop=LoopConfig(steps=3_000_000, save_every=50)
    )
    short = stretched(config)
    schedule = dataclasses.replace(
        config.schedule, kl_steps=5, temperature_steps=150, lr_steps=1_200, lr_warmup_steps=1, warm_start_steps=0
    )
    assert short == dataclasses.replace(
        config, schedule=schedule, loop=dataclasses.replace(config.loop, steps=3_000)
    ), "300 steps become 1, not 0; none stay none"
    assert stretched(dataclasses.replace(config, stretch=1.0)) == dataclasses.replace(config, stretch=1.0)
    assert stretched(dataclasses.replace(config, stretch=2.0)).loop.steps == 6_000_000


def test_stretching_knows_every_field_that_is_a_number_of_steps():
    names = {field.name for field in dataclasses.fields(DVAEScheduleConfig) if field.name.endswith("_steps")}
    assert names == set(config.DVAE_STEPS)
