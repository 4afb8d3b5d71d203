"""From an S3 server on loopback: train-tokenizer and encode-images make what they make of the same files."""

import boto3
import numpy as np
import pytest
from conftest import run_here
from s3_faults import FaultyProxy, S3Server
from test_encode_images import command, contents, dvae, shards, whole  # noqa: F401

from dalle_ds.cli import main
from dalle_ds.config import InputError
from dalle_ds.data.pipeline import Reader
from dalle_ds.data.token_shards import open_token_source, token_decode
from dalle_ds.tokenizer import Tokenizer

SETTINGS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
HASTY = ["--read.n_attempt", 3, "--read.backoff_seconds", 0, "--read.max_backoff_seconds", 0]


@pytest.fixture(scope="module")
def proxy(shards):  # noqa: F811
    """What stands before a server whose bucket `pairs` holds the shards."""
    server = S3Server()
    proxy = FaultyProxy(server.port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        client = boto3.client("s3")
        client.create_bucket(Bucket="pairs")
        for path in sorted(shards.glob("*.tar")):
            client.put_object(Bucket="pairs", Key=f"train/{path.name}", Body=path.read_bytes())
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy
    proxy.close()
    server.close()


def without_origins(folder):
    """Shards and manifest; markers and log name where the data lay."""
    return {name: content for name, content in contents(folder).items() if name.endswith(".tar") or "mani" in name}


def test_token_shards_of_pictures_in_a_bucket_are_those_of_the_files(dvae, whole, proxy, tmp_path):  # noqa: F811
    out = tmp_path / "tokens"
    run_here(*command(dvae, "s3://pairs/train/{00000..00004}.tar", out))
    assert without_origins(out) == without_origins(whole)


def test_a_shard_that_cannot_be_read_ends_the_run_which_goes_on_later(dvae, whole, proxy, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "tokens"
    words = [str(word) for word in command(dvae, "s3://pairs/train/{00000..00004}.tar", out, *HASTY)]
    proxy.always["00002.tar"] = "slow_down"
    try:
        assert main(words) == 2
    finally:
        proxy.always.clear()
    assert "s3://pairs/train/00002.tar" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert main(words) == 0
    assert without_origins(out) == without_origins(whole)


def test_a_tokenizer_of_captions_in_a_bucket_is_that_of_the_files(shards, proxy, tmp_path):  # noqa: F811
    models = []
    for name, data in (("files", shards), ("bucket", "s3://pairs/train/{00000..00004}.tar")):
        run_here("train-tokenizer", "--data", data, "--out", tmp_path / name, "--vocab_size", 280)
        models.append(Tokenizer.load(tmp_path / name).sha256)
    assert models[0] == models[1]


def test_token_shards_in_a_bucket_are_read_with_their_manifest(whole, proxy):  # noqa: F811
    client = boto3.client("s3")
    for path in [*sorted(whole.glob("*.tar")), whole / "manifest.json"]:
        client.put_object(Bucket="pairs", Key=f"tokens/{path.name}", Body=path.read_bytes())
    run_here("index", "s3://pairs/tokens")
    found = []
    for data in (str(whole), "s3://pairs/tokens"):
        source, manifest = open_token_source(data)
        with Reader(source, token_decode(manifest), 15, epochs=1) as reader:
            found.append(next(reader))
    assert found[0]["caption"] == found[1]["caption"]
    np.testing.assert_array_equal(found[0]["codes"], found[1]["codes"])
    with pytest.raises(InputError, match=r"s3://pairs/train: not token shards \(no manifest\.json\)"):
        open_token_source("s3://pairs/train")
