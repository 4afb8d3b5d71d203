"""Token shards: written, read back through the Reader, and refused when they are something else."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest

from dalle_ds.config import InputError
from dalle_ds.data.pipeline import Reader
from dalle_ds.data.skips import BadSample
from dalle_ds.data.token_shards import (
    TokenManifest,
    encode_codes,
    open_token_source,
    read_manifest,
    token_decode,
    write_manifest,
)
from dalle_ds.data.writer import ShardWriter

MANIFEST = TokenManifest(n_samples=5, grid_size=4, vocab_size=300, dvae="runs/dvae", dvae_sha256="ab")


def write_tokens(folder: Path, manifest: TokenManifest = MANIFEST) -> str:
    generator = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=2) as writer:
        for index in range(manifest.n_samples):
            codes = generator.integers(manifest.vocab_size, size=(manifest.grid_size, manifest.grid_size))
            writer.write({"npy": encode_codes(codes), "txt": f"caption {index}".encode()})
    write_manifest(folder, manifest)
    return str(folder)


def test_tokens_come_back_as_they_were_written(tmp_path: Path) -> None:
    source, manifest = open_token_source(write_tokens(tmp_path))
    assert manifest == MANIFEST
    with Reader(source, token_decode(manifest), 5, epochs=1) as reader:
        batch = next(reader)
    assert batch["codes"].shape == (5, 4, 4)
    assert batch["codes"].dtype == np.int64
    expected = np.random.default_rng(0).integers(300, size=(4, 4))
    np.testing.assert_array_equal(batch["codes"][batch["caption"].index("caption 0")], expected)
    assert sorted(batch["key"]) == ["000000000", "000000001", "000010000", "000010001", "000020000"]


def test_the_manifest_is_found_from_a_pattern(tmp_path: Path) -> None:
    write_tokens(tmp_path)
    assert read_manifest(f"{tmp_path}/{{00000..00001}}.tar") == MANIFEST
    assert len(open_token_source(f"{tmp_path}/00001.tar")[0].parts) == 1


def test_folders_of_one_dvae_add_up_and_of_two_are_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a")
    write_tokens(tmp_path / "b")
    assert read_manifest(f"{tmp_path}/a::{tmp_path}/b").n_samples == 10
    write_manifest(tmp_path / "b", dataclasses.replace(MANIFEST, dvae_sha256="cd"))
    with pytest.raises(InputError, match="another dVAE"):
        read_manifest(f"{tmp_path}/a::{tmp_path}/b")


def test_shards_without_a_manifest_are_no_token_shards(tmp_path: Path) -> None:
    write_tokens(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"not token shards .* dalle-ds encode-images"):
        open_token_source(str(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"other": 1}'])
def test_a_manifest_of_something_else_is_refused_by_name(tmp_path: Path, content: str) -> None:
    write_tokens(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        read_manifest(str(tmp_path))


def test_a_number_of_the_manifest_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({**dataclasses.asdict(MANIFEST), "grid_size": "8"}))
    with pytest.raises(InputError, match="grid_size '8'"):
        read_manifest(str(tmp_path))


def test_picture_shards_with_a_manifest_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 10) as writer:
        writer.write({"png": b"p", "txt": b"t"})
    write_manifest(tmp_path, MANIFEST)
    with pytest.raises(InputError, match="no sample has image tokens"):
        open_token_source(str(tmp_path))


@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        (encode_codes(np.zeros((3, 4))), r"shape \[3, 4\]"),
        (encode_codes(np.full((4, 4), 300)), r"outside of 0 \.\. 299"),
        (encode_codes(np.zeros((4, 4)))[:-4], "do not parse"),
        (b"", "do not parse"),
    ],
)
def test_tokens_that_the_manifest_does_not_allow_are_bad_samples(codes: bytes, reason: str) -> None:
    sample = {"codes": codes, "caption": "c", "key": "k"}
    with pytest.raises(BadSample, match=reason):
        token_decode(MANIFEST)(sample, np.random.default_rng(0))


def test_pickled_arrays_are_never_loaded() -> None:
    content = io.BytesIO()
    np.save(content, np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(BadSample, match="do not parse"):
        token_decode(MANIFEST)({"codes": content.getvalue(), "caption": "", "key": ""}, np.random.default_rng(0))
