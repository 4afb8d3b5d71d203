"""Trained models out of run folders: whole weights out of pieces, checked, and one line for what does not fit."""

import dataclasses
import hashlib

import pytest
import torch

from dalle_ds.config import DVAEConfig, InputError, PriorConfig
from dalle_ds.models import weights as weights_module
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.prior import Prior
from dalle_ds.models.weights import (
    check_settings,
    find_weights,
    fingerprint,
    load_dvae,
    load_prior,
    open_weights,
    write_weights,
)
from dalle_ds.storage.files import write_json
from dalle_ds.storage.folders import begin, publish
from dalle_ds.storage.pieces import Piece, write_pieces, write_tensors

DVAE_CONFIG = DVAEConfig(image_size=32, n_hid=8, n_blk_per_group=1, n_init=8, vocab_size=16)
PRIOR_CONFIG = PriorConfig(
    text_vocab_size=11, text_len=6, image_vocab_size=16, grid_size=4, n_layer=2, n_head=2, head_dim=8
)


def describe(kind, config):
    return {"kind": kind, "version": "0", "config": {"model": dataclasses.asdict(config)}}


def write_run(run, kind, config, models):
    """A run folder with a checkpoint for every (step, model)."""
    run.mkdir(exist_ok=True)
    write_json(run / "config.json", describe(kind, config))
    for step, model in models.items():
        write_weights(run, describe(kind, config), step, model.state_dict().items())


def write_sharded(run, step, weights, averages, n_ranks):
    """A checkpoint as `n_ranks` processes write it: each has a part of every weight, and of the average."""
    folder = begin(run, step)
    (folder / "shards").mkdir()
    records = {"config.json": write_json(folder / "config.json", describe("dvae", DVAE_CONFIG))}
    for rank in range(n_ranks):
        pieces = []
        for kind, tensors in (("weight", weights), ("average", averages)):
            for name, tensor in tensors.items():
                size = -(-tensor.numel() // n_ranks)
                pieces.append(Piece(name, kind, rank * size, tensor.flatten()[rank * size : (rank + 1) * size]))
        path = f"shards/shard-{rank:05d}.safetensors"
        records[path] = write_pieces(folder / path, pieces, {})
    return publish(folder, {"step": step, "world_size": n_ranks, "files": records})


@pytest.fixture
def models():
    return {5: DVAE(DVAE_CONFIG), 10: DVAE(DVAE_CONFIG)}


@pytest.fixture
def run(tmp_path, models):
    write_run(tmp_path / "run", "dvae", DVAE_CONFIG, models)
    return tmp_path / "run"


def assert_same(model, weights):
    for name, tensor in weights.items():
        assert model.state_dict()[name].equal(tensor), name


@pytest.mark.parametrize("step", [5, 10])
def test_a_checkpoint_folder_gives_its_own_weights_and_the_run_folder_the_newest(run, models, step):
    folder = run / "checkpoints" / f"step-{step:08d}"
    loaded = load_dvae(folder)
    assert not loaded.training
    assert loaded.config == DVAE_CONFIG
    assert_same(loaded, models[step].state_dict())
    if step == 10:
        assert find_weights(run, "dvae")[0] == folder
        assert fingerprint(run, "dvae") == fingerprint(folder, "dvae")
    else:
        assert fingerprint(run, "dvae") != fingerprint(folder, "dvae")


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_whole_weights_and_their_average_come_out_of_the_pieces_of_any_number_of_ranks(run, models, n_ranks):
    weights, averages = (DVAE(DVAE_CONFIG).state_dict() for _ in range(2))
    checkpoint = write_sharded(run, 20, weights, averages, n_ranks)
    assert find_weights(run, "dvae")[0] == checkpoint
    assert_same(load_dvae(run), averages)
    assert_same(load_dvae(run, averaged=False), weights)
    # A run that kept no average has its weights.
    assert_same(load_dvae(run / "checkpoints/step-00000010"), models[10].state_dict())


def test_a_fingerprint_is_that_of_the_exported_file_however_the_weights_were_cut(run, tmp_path):
    weights, averages = (DVAE(DVAE_CONFIG).state_dict() for _ in range(2))
    found = set()
    for step, n_ranks in ((20, 1), (30, 3)):
        write_sharded(run, step, weights, averages, n_ranks)
        found.add(fingerprint(run, "dvae", averaged=False))
    with open_weights(run, "dvae", averaged=False) as opened:
        record = write_tensors(tmp_path / "file", opened.entries(), (tensor for _, tensor in opened.tensors()))
    assert found == {record["sha256"]} == {hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()}
    assert fingerprint(run, "dvae") not in found


def test_a_checkpoint_that_is_not_complete_is_passed_over(run):
    begin(run, 15)
    (run / "checkpoints/step-00000010/complete.json").rename(run / "checkpoints/step-00000015.partial/complete.json")
    assert find_weights(run, "dvae")[0].name == "step-00000005"


def test_half_precision_weights_become_a_float32_model(tmp_path):
    prior = Prior(PRIOR_CONFIG)
    write_run(tmp_path / "run", "prior", PRIOR_CONFIG, {1: prior.bfloat16()})
    loaded = load_prior(tmp_path / "run")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert_same(loaded, {name: tensor.float() for name, tensor in prior.state_dict().items()})


def test_a_damaged_file_is_one_line_that_names_it(run, monkeypatch):
    shard = run / "checkpoints/step-00000010/shards/shard-00000.safetensors"
    content = shard.read_bytes()
    monkeypatch.setattr(weights_module, "READ_THROUGH", 2**30)
    for damaged, said in [
        (content[:-1], f"has {len(content) - 1} bytes"),
        (content[:-1] + bytes([content[-1] ^ 1]), "has another checksum"),
        (b"\xff" * 8 + content[8:], "has another checksum"),
    ]:
        shard.write_bytes(damaged)
        for load in (lambda: load_dvae(run), lambda: fingerprint(run, "dvae")):
            with pytest.raises(InputError, match=said) as error:
                load()
            assert str(error.value).startswith(f"{shard} ")
            assert "older checkpoint" in str(error.value)
            assert "\n" not in str(error.value)
    # Of what is large only the size is looked at, and a header that cannot be read is told of all the same.
    monkeypatch.setattr(weights_module, "READ_THROUGH", 0)
    with pytest.raises(InputError, match=r"shard-00000\.safetensors is damaged") as error:
        load_dvae(run)
    assert "\n" not in str(error.value)
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    load_dvae(run)
    with pytest.raises(InputError, match="another checksum"), open_weights(run, "dvae", read_through=True):
        pass
    shard.write_bytes(content)
    load_dvae(run)


def test_what_is_no_run_of_that_kind_is_refused_in_one_line_with_the_path(tmp_path, run):
    write_run(tmp_path / "young", "dvae", DVAE_CONFIG, {})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"architectures": ["Other"]}')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"kind": "dv')
    old = tmp_path / "old"
    write_run(old, "dvae", DVAE_CONFIG, {1: DVAE(DVAE_CONFIG)})
    (old / "checkpoints/step-00000001/complete.json").write_text('{"step": 1, "imported": true}')
    for path, load, said in [
        (tmp_path / "nowhere", load_dvae, "no run folder"),
        (tmp_path / "young", load_dvae, "no complete checkpoint yet"),
        (run, load_prior, "holds a dvae, and a prior is wanted"),
        (foreign, load_dvae, "foreign"),
        (broken, load_dvae, "broken"),
        (old, load_dvae, "was written by another version, in another format"),
    ]:
        with pytest.raises(InputError, match=said) as error:
            load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [{"n_blk_per_group": 2}, {"vocab_size": 8}, {"n_hid": 4}], ids=["another-name", "a-smaller", "smaller"]
)
def test_weights_that_do_not_fit_their_config_are_refused_naming_a_parameter(tmp_path, change):
    other = dataclasses.replace(DVAE_CONFIG, **change)
    write_run(tmp_path / "run", "dvae", other, {1: DVAE(DVAE_CONFIG)})
    with pytest.raises(InputError, match=r"another model: parameter '(encoder|decoder)") as error:
        load_dvae(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_weights_begin_a_model_of_the_same_settings_whose_dropout_may_differ(tmp_path):
    write_run(tmp_path / "run", "prior", PRIOR_CONFIG, {1: Prior(PRIOR_CONFIG)})
    checkpoint = check_settings(tmp_path / "run", "prior", dataclasses.replace(PRIOR_CONFIG, dropout=0.5))
    assert checkpoint == tmp_path / "run/checkpoints/step-00000001"
    with pytest.raises(InputError, match=r"is another model: pass --model.n_layer 2 --model.pb_relax False"):
        check_settings(tmp_path / "run", "prior", dataclasses.replace(PRIOR_CONFIG, n_layer=3, pb_relax=True))
