"""Presets: each can be built, has the size that its name says, and is found by name."""

import pytest
import torch

from dalle_ds.config import InputError
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.prior import Prior
from dalle_ds.presets import PRESETS, find_preset


def count_parameters(config):
    """In closed form: the matrices of the layers alone, and everything."""
    d = config.dim
    matrices = config.n_layer * 12 * d**2
    vectors = config.n_layer * (4 * d + 4 * d + 5 * d)  # two norms; attention's biases; the MLP's biases
    text = config.text_vocab_size * d + d + 2 * config.text_len * d  # tokens, start, positions and pads
    image = config.image_vocab_size * d + d + 2 * config.grid_size * d  # tokens, start, rows and columns
    heads = (config.text_vocab_size + config.image_vocab_size) * d + 4 * d
    return matrices, matrices + vectors + text + image + heads


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_has_the_parameters_of_the_closed_form(name):
    preset = find_preset(name)
    with torch.device("meta"):
        prior, dvae = Prior(preset.prior.model), DVAE(preset.dvae.model)
    assert sum(parameter.numel() for parameter in prior.parameters()) == count_parameters(preset.prior.model)[1]
    assert sum(parameter.numel() for parameter in dvae.parameters()) > 0


@pytest.mark.parametrize(("name", "n_parameters"), [("1.3b", 1.3e9), ("2.8b", 2.8e9), ("5.6b", 5.6e9), ("12b", 12e9)])
def test_a_preset_has_the_size_of_its_name(name, n_parameters):
    """Between its layers alone and all that it has; the last digit of a name is rounded down by up to 1.2%."""
    matrices, everything = count_parameters(find_preset(name).prior.model)
    assert matrices / 1.012 < n_parameters < everything


def test_the_largest_is_the_papers_model():
    model = find_preset("12b").prior.model
    assert count_parameters(model)[0] == pytest.approx(12.0e9, rel=0.01)
    assert (model.n_layer, model.n_head, model.head_dim, model.dim) == (64, 62, 64, 3968)
    assert (model.text_len, model.grid_size, model.seq_len) == (256, 32, 1280)
    assert (model.text_vocab_size, model.image_vocab_size) == (16_384, 8192)


@pytest.mark.parametrize("name", PRESETS)
def test_both_stages_of_a_preset_fit_each_other(name):
    preset = find_preset(name)
    assert preset.prior.model.image_vocab_size == preset.dvae.model.vocab_size
    assert preset.prior.model.grid_size == preset.dvae.model.grid_size


@pytest.mark.parametrize("name", PRESETS)
def test_no_schedule_outlasts_its_run(name):
    preset = find_preset(name)
    for stage in (preset.dvae, preset.prior):
        assert 0 < stage.schedule.lr_steps <= stage.loop.steps
    assert preset.dvae.schedule.temperature_steps <= preset.dvae.loop.steps
    assert preset.dvae.schedule.kl_steps <= preset.dvae.loop.steps


def test_a_preset_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(InputError, match="--preset 'huge' does not exist; presets are tiny, small") as error:
        find_preset("huge")
    for name in PRESETS:
        assert name in str(error.value)
