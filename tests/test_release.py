"""The authors' release and ours are one model: weights of either go into the other, and misfits are named."""

import dataclasses
import json

import dall_e
import pytest
import torch
from safetensors.torch import save_file

from dalle_ds.config import DVAEConfig, InputError
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.release import assemble, export_part, find_differences, note_path, read_part

SIZES = {"n_hid": 64, "vocab_size": 512, "n_blk_per_group": 1}
CONFIG = DVAEConfig(image_size=32, n_init=8, **SIZES)


def make_released(n_init=8, **changes):
    return dall_e.Encoder(**SIZES | changes).eval(), dall_e.Decoder(n_init=n_init, **SIZES | changes).eval()


@pytest.fixture(scope="module")
def released():
    torch.manual_seed(0)
    return make_released()


@pytest.fixture(scope="module")
def pickles(released, tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    for name, module in zip(("encoder.pkl", "decoder.pkl"), released, strict=True):
        torch.save(module, folder / name)
    return folder / "encoder.pkl", folder / "decoder.pkl"


def read(*paths, **arguments):
    return assemble(*map(read_part, paths), **arguments)


def assert_same_outputs(model, released):
    """Bit for bit, on pictures whose channels lie as those of the release do."""
    encoder, decoder = released
    mapped = dall_e.map_pixels(torch.rand(2, 3, 32, 32))
    with torch.no_grad():
        logits = encoder(mapped)
        assert model.encoder(mapped).equal(logits)
        weights = torch.nn.functional.one_hot(logits.argmax(1), 512).permute(0, 3, 1, 2).float().contiguous()
        assert model.decoder(weights).equal(decoder(weights))


def test_the_released_modules_are_read_with_their_sizes_and_compute_the_same(pickles, released):
    model = read(*pickles, image_size=32)
    assert model.config == CONFIG
    assert not model.training
    assert_same_outputs(model, released)


def test_sizes_are_worked_out_and_pictures_are_256_wide_by_default(tmp_path):
    modules = make_released(n_init=12, n_hid=68, vocab_size=520, n_blk_per_group=2)
    for name, module in zip(("encoder", "decoder"), modules, strict=True):
        torch.save(module.state_dict(), tmp_path / f"{name}.pth")
    model = read(tmp_path / "encoder.pth", tmp_path / "decoder.pth")
    assert model.config == DVAEConfig(image_size=256, n_hid=68, n_blk_per_group=2, n_init=12, vocab_size=520)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_what_is_exported_is_loaded_by_the_release_and_imported_as_it_was(tmp_path, released, suffix):
    torch.manual_seed(1)
    model = DVAE(CONFIG).eval()
    paths = {part: tmp_path / f"{part}.{suffix}" for part in ("encoder", "decoder")}
    for part, path in paths.items():
        for file, data in export_part(model, part, path, "here").items():
            file.write_bytes(data)
    again = read(*paths.values())
    assert again.config == CONFIG  # the size of the pictures too, which is in the JSON beside
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name
    if suffix == "pt":
        modules = make_released()
        for module, path in zip(modules, paths.values(), strict=True):
            module.load_state_dict(torch.load(path, weights_only=True))
        assert_same_outputs(model, modules)


def test_all_settings_come_back_even_those_that_the_release_does_not_know(tmp_path):
    config = DVAEConfig(
        image_size=16, n_hid=8, n_blk_per_group=1, n_init=4, vocab_size=9, post_gain=0.5, pool="average", min_scale=0.1
    )
    paths = tmp_path / "e.pt", tmp_path / "d.pt"
    for part, path in zip(("encoder", "decoder"), paths, strict=True):
        for file, data in export_part(DVAE(config), part, path, "here").items():
            file.write_bytes(data)
    assert read(*paths).config == config
    assert read(*paths, image_size=24).config == dataclasses.replace(config, image_size=24)


def test_a_changed_constant_on_the_resblocks_of_a_saved_module_is_kept(tmp_path, pickles):
    encoder, decoder = make_released()
    for module in (encoder, decoder):
        for block in module.modules():
            if hasattr(block, "post_gain"):
                block.post_gain = 0.25
    torch.save(encoder, tmp_path / "e.pkl")
    torch.save(decoder, tmp_path / "d.pkl")
    model = read(tmp_path / "e.pkl", tmp_path / "d.pkl")
    assert model.config.post_gain == 0.25
    assert_same_outputs(model, (encoder, decoder))
    with pytest.raises(InputError, match=r"different post_gain \[0.0625, 0.25\]"):
        read(tmp_path / "e.pkl", pickles[1])


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


CONV = "blocks.group_2.block_1.res_path.conv_3.w"
# What is done to the encoder's state dict, and what is said then.
MISFITS = {
    "missing": (lambda state: _without(state, CONV), rf"'{CONV}' is missing"),
    "extra": (lambda state: {**state, "blocks.extra": torch.zeros(1)}, r"'blocks\.extra' is not of this model"),
    "shape": (lambda state: {**state, CONV: torch.zeros(32, 32, 1, 1)}, r"\[32, 32, 1, 1\], and \[32, 32, 3, 3\] goes"),
    "nan": (lambda state: {**state, CONV: torch.full((32, 32, 3, 3), torch.nan)}, r"holds 9216 numbers that are not"),
    "no-output": (lambda state: _without(state, "blocks.output.conv.w"), r"holds no encoder of the release"),
    "no-blocks": (
        lambda state: {key: value for key, value in state.items() if "group" not in key},
        r"holds no encoder of the release",
    ),
    "prefixed": (lambda state: {f"module.{key}": value for key, value in state.items()}, r"holds no encoder"),
    "nothing": (lambda state: {"x": torch.zeros(1)}, r"holds no encoder"),
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_not_an_encoders_are_refused_in_one_line_that_names_the_parameter(
    tmp_path, released, pickles, name, suffix
):
    change, said = MISFITS[name]
    path, state = tmp_path / f"encoder.{suffix}", change(released[0].state_dict())
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    with pytest.raises(InputError, match=said) as error:
        read(path, pickles[1])
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 513}, "has vocab_size 512 and .* has 513"),
        ({"n_hid": 68}, "has n_hid 64 and .* has 68"),
        ({"n_blk_per_group": 2}, "has n_blk_per_group 1 and .* has 2"),
    ],
    ids=["vocab", "width", "depth"],
)
def test_an_encoder_and_a_decoder_of_different_models_are_refused(tmp_path, pickles, changes, said):
    torch.save(make_released(**changes)[1].state_dict(), tmp_path / "decoder.pt")
    with pytest.raises(InputError, match=f"{said}: they are not of one dVAE"):
        read(pickles[0], tmp_path / "decoder.pt")


def test_exchanged_files_and_one_file_given_twice_are_refused(tmp_path, pickles):
    with pytest.raises(InputError, match="exchange the two"):
        read(*reversed(pickles))
    with pytest.raises(InputError, match=r"encoder\.pkl holds an encoder of the release; give the decoder's"):
        read(pickles[0], pickles[0])
    with pytest.raises(InputError, match="is no file"):
        read(tmp_path, pickles[1])
    with pytest.raises(InputError, match="image_size 60 is not a multiple of 8"):
        read(*pickles, image_size=60)
    (tmp_path / "text.safetensors").write_text("nothing")
    with pytest.raises(InputError, match="no whole safetensors file"):
        read(tmp_path / "text.safetensors", pickles[1])


def test_a_note_of_another_file_or_another_export_is_refused(tmp_path):
    paths = tmp_path / "e.pt", tmp_path / "d.pt"
    for part, path in zip(("encoder", "decoder"), paths, strict=True):
        config = dataclasses.replace(CONFIG, image_size=32 if part == "encoder" else 64)
        for file, data in export_part(DVAE(config), part, path, "here").items():
            file.write_bytes(data)
    with pytest.raises(InputError, match="exported from two dVAEs"):
        read(*paths)
    note = json.loads(note_path(paths[0]).read_text())
    for text, said in [(json.dumps({**note, "sha256": "0"}), "note of another file"), ("{", "is no note of")]:
        note_path(paths[0]).write_text(text)
        with pytest.raises(InputError, match=said):
            read(*paths)


def test_what_the_released_classes_cannot_compute_is_listed_with_what_they_do():
    assert find_differences(CONFIG) == []
    assert find_differences(DVAEConfig(post_gain=1 / 64)) == []
    config = DVAEConfig(n_hid=16, n_init=4, vocab_size=100, post_gain=0.25, pool="average", min_scale=0.3)
    said = "\n".join(find_differences(config))
    for words in ("n_hid 16", "below 64", "vocab_size 100", "below 512", "n_init 4", "below 8"):
        assert words in said
    for words in ("post_gain 0.25", "0.015625", "pool average", "maximum", "min_scale 0.3", "no floor"):
        assert words in said


@pytest.mark.slow
def test_the_full_size_is_read_as_it_was_released(tmp_path):
    counts = []
    for name, build in (("encoder", dall_e.Encoder), ("decoder", dall_e.Decoder)):
        module = build()
        counts.append(sum(p.numel() for p in module.parameters()))
        torch.save(module, tmp_path / f"{name}.pkl")
    assert counts == [53_786_240, 43_829_766]
    model = read(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl")
    assert model.config == DVAEConfig()
    assert [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder)] == counts
    assert all(model.decoder.state_dict()[name].equal(tensor) for name, tensor in module.state_dict().items())
