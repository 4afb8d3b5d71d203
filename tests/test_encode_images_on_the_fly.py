"""Training from pixels: the frozen dVAE gives, as training goes, the tokens that encode-images would have written."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from conftest import run_here, run_in_ranks
from PIL import Image
from programs import assert_same_weights, read_json, read_lines

from dalle_ds.cli import main
from dalle_ds.commands.import_dvae import write_imported
from dalle_ds.commands.train_prior import encode_pictures, read_tokens
from dalle_ds.config import DataConfig, DVAEConfig, InputError, PriorTraining
from dalle_ds.data.pipeline import Reader
from dalle_ds.data.writer import ShardWriter
from dalle_ds.models.dvae import DVAE
from dalle_ds.training.distributed import Ranks

SIZE, N = 32, 24
HERE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures larger than the dVAE's, their token shards, and the dVAE."""
    folder = tmp_path_factory.mktemp("pixels")
    torch.manual_seed(0)
    model = DVAE(DVAEConfig(image_size=SIZE, n_hid=8, n_blk_per_group=1, n_init=8, vocab_size=64))
    write_imported(folder / "dvae", model, {})
    with torch.no_grad():
        model.encoder.blocks.output.conv.b[3] += 1e4
    write_imported(folder / "dull", model, {})
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "pictures", 10) as writer:
        for i in range(N):
            content = io.BytesIO()
            coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((50 + i, 60)).save(content, "PNG")
            writer.write({"png": content.getvalue(), "txt": f"picture {i}".encode()})
    run_here("encode-images", "--dvae", folder / "dvae", "--data", folder / "pictures", "--out", folder / "tokens")
    return folder


def configure(folder, data, **changes):
    config = PriorTraining(data=DataConfig(train=str(folder / data), validation=str(folder / data)))
    return dataclasses.replace(config, **changes)


def tokens_by_caption(tokens, decode, **options):
    with Reader(tokens.train, decode, N, epochs=1, **options) as reader:
        batch = next(reader)
        return dict(zip(batch["caption"], tokens.codes(batch), strict=True))


def test_centre_crops_give_the_tokens_of_the_token_shards(folder):
    written = read_tokens(configure(folder, "tokens"))
    fresh = encode_pictures(configure(folder, "pictures", from_pixels=True, augment=False), str(folder / "dvae"), HERE)
    expected = tokens_by_caption(written, written.train_decode)
    assert len(expected) == N
    for decode in (fresh.train_decode, fresh.decode):
        found = tokens_by_caption(fresh, decode, seed=1, shuffle_buffer=8)
        assert found.keys() == expected.keys()
        for caption, tokens in found.items():
            assert tokens.equal(expected[caption]), caption
    for name in ("grid_size", "vocab_size", "dvae_sha256"):
        assert getattr(fresh.manifest, name) == getattr(written.manifest, name)


def test_random_crops_differ_from_epoch_to_epoch_and_validation_never_does(folder):
    tokens = encode_pictures(configure(folder, "pictures", from_pixels=True), str(folder / "dvae"), HERE)

    def two_epochs(decode):
        with Reader(tokens.train, decode, N) as reader:
            return [tokens.codes(next(reader)) for _ in range(2)]

    first, second = two_epochs(tokens.train_decode)
    assert not first.equal(second)
    assert two_epochs(tokens.train_decode)[0].equal(first)
    first, second = two_epochs(tokens.decode)
    assert first.equal(second)


def test_a_dvae_that_tells_nothing_apart_is_refused_before_training(folder):
    with pytest.raises(InputError, match=r"every cell of 24 pictures got token 3"):
        encode_pictures(configure(folder, "pictures", from_pixels=True), str(folder / "dull"), HERE)


def test_training_from_pixels_without_a_dvae_says_what_to_give(chain, tmp_path, capsys):
    command = chain.train_prior(tmp_path / "out", "--from_pixels", "true", data=chain / "scenes/train")
    assert main([str(word) for word in command]) == 2
    assert "--from_pixels needs the dVAE that encodes: give --dvae" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_training_from_pixels_and_from_token_shards_end_with_the_same_weights(chain, tmp_path):
    shards, pixels = tmp_path / "shards", tmp_path / "pixels"
    flags = ["--from_pixels", "true", "--augment", "false", "--dvae", chain / "dvae"]
    validation = [["--data.validation", chain / kind / "validation"] for kind in ("tokens", "scenes")]
    run_in_ranks(
        1,
        chain.train_prior(shards, *validation[0]),
        chain.train_prior(pixels, *flags, *validation[1], data=chain / "scenes/train"),
    )
    for kind in ("train", "validation"):
        losses = [[line["loss"] for line in read_lines(run, kind)] for run in (shards, pixels)]
        assert losses[0] == losses[1]
    assert_same_weights(shards, pixels)
    facts = [read_json(run / "config.json") for run in (shards, pixels)]
    assert facts[0]["dvae_sha256"] == facts[1]["dvae_sha256"]
