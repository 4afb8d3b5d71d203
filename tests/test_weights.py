"""Trained models out of run folders: the newest whole checkpoint, and one line for what does not fit."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from dalle_ds.config import DVAEConfig, InputError, PriorConfig
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.prior import Prior
from dalle_ds.models.weights import find_weights, fingerprint, load_dvae, load_prior

DVAE_CONFIG = DVAEConfig(image_size=32, n_hid=8, n_blk_per_group=1, n_init=8, vocab_size=16)
PRIOR_CONFIG = PriorConfig(
    text_vocab_size=11, text_len=6, image_vocab_size=16, grid_size=4, n_layer=2, n_head=2, head_dim=8
)


def write_run(run, kind, config, models):
    """A run folder as training writes it, with a checkpoint for every (step, model)."""
    run.mkdir()
    description = {"kind": kind, "version": "0", "config": {"model": dataclasses.asdict(config)}}
    (run / "config.json").write_text(json.dumps(description))
    for step, model in models.items():
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "complete.json").write_text("{}")


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", "dvae", DVAE_CONFIG, {5: DVAE(DVAE_CONFIG), 10: DVAE(DVAE_CONFIG)})
    return tmp_path / "run"


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("step", [5, 10])
def test_a_checkpoint_folder_gives_its_own_weights_and_the_run_folder_the_newest(run, step):
    folder = run / "checkpoints" / f"step-{step:08d}"
    loaded = load_dvae(folder)
    assert not loaded.training
    assert loaded.config == DVAE_CONFIG
    for name, tensor in weights_of(folder).items():
        assert loaded.state_dict()[name].equal(tensor), name
    if step == 10:
        assert find_weights(run, "dvae")[0] == folder / "model.safetensors"
        assert fingerprint(run, "dvae") == fingerprint(folder, "dvae")
    else:
        assert fingerprint(run, "dvae") != fingerprint(folder, "dvae")


def test_averaged_parameters_are_taken_where_there_are_some_unless_the_last_ones_are_asked_for(run):
    folder = run / "checkpoints/step-00000010"
    last = fingerprint(run, "dvae")
    averaged = DVAE(DVAE_CONFIG).state_dict()
    save_file(averaged, folder / "averaged.safetensors")
    assert find_weights(run, "dvae")[0].name == "averaged.safetensors"
    assert fingerprint(run, "dvae") != last
    assert fingerprint(run, "dvae", averaged=False) == last
    assert find_weights(run / "checkpoints/step-00000005", "dvae")[0].name == "model.safetensors"
    for model, expected in [(load_dvae(run), averaged), (load_dvae(run, averaged=False), weights_of(folder))]:
        for name, tensor in expected.items():
            assert model.state_dict()[name].equal(tensor), name


def test_a_checkpoint_without_its_marker_is_passed_over(run):
    (run / "checkpoints/step-00000010/complete.json").unlink()
    assert find_weights(run, "dvae")[0].parent.name == "step-00000005"


def test_half_precision_weights_become_a_float32_model(tmp_path):
    prior = Prior(PRIOR_CONFIG)
    write_run(tmp_path / "run", "prior", PRIOR_CONFIG, {1: prior.bfloat16()})
    loaded = load_prior(tmp_path / "run")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_what_is_no_run_of_that_kind_is_refused_in_one_line_with_the_path(tmp_path, run):
    write_run(tmp_path / "young", "dvae", DVAE_CONFIG, {})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"architectures": ["Other"]}')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"kind": "dv')
    for path, load, said in [
        (tmp_path / "nowhere", load_dvae, "no run folder"),
        (tmp_path / "young", load_dvae, "no complete checkpoint yet"),
        (run, load_prior, "holds a dvae, and a prior is wanted"),
        (foreign, load_dvae, "foreign"),
        (broken, load_dvae, "broken"),
    ]:
        with pytest.raises(InputError, match=said) as error:
            load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"n_blk_per_group": 2}, {"vocab_size": 32}, {"n_hid": 16}],
    ids=["another-name", "another-shape", "other-shapes"],
)
def test_weights_that_do_not_fit_their_config_are_refused_naming_a_parameter(tmp_path, change):
    other = dataclasses.replace(DVAE_CONFIG, **change)
    write_run(tmp_path / "run", "dvae", other, {1: DVAE(DVAE_CONFIG)})
    with pytest.raises(InputError, match=r"another model: parameter '(encoder|decoder)") as error:
        load_dvae(tmp_path / "run")
    assert "\n" not in str(error.value)
