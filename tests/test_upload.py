"""Copies of checkpoints in S3, on a real server: whole and complete, or a warning; and back onto another disk."""

import json
import os
import shutil
import sys

import boto3
import pytest
import torch
from s3_faults import S3Server
from test_commands import ROOT, start

from dalle_ds.config import InputError, ReadConfig
from dalle_ds.data import s3
from dalle_ds.data.upload import Uploader, fetch_newest
from dalle_ds.training.folders import begin, find_faults, publish, remove
from dalle_ds.training.portable import Piece, write_json, write_pieces
from dalle_ds.training.run import open_run, write_run

URL = "s3://weights/runs/a"
HASTY = ReadConfig(n_attempt=2, backoff_seconds=0.0, max_backoff_seconds=0.0, stall_seconds=5.0)
PART = 5 * 2**20  # the smallest that S3 takes


@pytest.fixture(scope="module")
def server():
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def bucket(server, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "WRITE_BYTES", PART)
    client = boto3.client("s3")
    client.create_bucket(Bucket="weights")
    yield client
    for key in keys(client):
        client.delete_object(Bucket="weights", Key=key)
    s3._client.cache_clear()


def keys(client):
    return [entry["Key"] for entry in client.list_objects_v2(Bucket="weights").get("Contents", [])]


def save(run, step, n=3):
    folder = begin(run, step)
    (folder / "shards").mkdir()
    name = "shards/0.safetensors"
    pieces = [Piece("w", "weight", 0, torch.arange(n, dtype=torch.float32))]
    files = {name: write_pieces(folder / name, pieces, {}), "state.json": write_json(folder / "state.json", step)}
    return publish(folder, {"step": step, "files": files})


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", "prior", {"model": {"dim": 8}}, {})
    (tmp_path / "run/tokenizer.model").write_bytes(b"pieces")
    return tmp_path / "run"


def test_a_checkpoint_goes_there_and_comes_back_bit_for_bit(bucket, run, tmp_path, capsys):
    uploader = Uploader(URL + "/", HASTY)
    uploader(save(run, 5))
    uploader.close()
    uploader = Uploader(URL, HASTY)
    checkpoint = save(run, 10, n=3 * PART // 4 + 1)  # four parts
    uploader(checkpoint)
    uploader.close()
    assert capsys.readouterr().out == ""
    assert not (run / "uploading").exists()
    other = tmp_path / "other"
    fetch_newest(URL, other, HASTY)
    fetched = open_run(other, "auto")
    assert fetched == other / "checkpoints/step-00000010"
    for path in checkpoint.rglob("*"):
        assert path.is_dir() or (fetched / path.relative_to(checkpoint)).read_bytes() == path.read_bytes()
    for name in ("config.json", "ds_config.json", "tokenizer.model"):
        assert (other / name).read_bytes() == (run / name).read_bytes()
    save(other, 20)
    fetch_newest(URL, other, HASTY)
    assert open_run(other, "auto").name == "step-00000020", "what is there already is newer"


def test_the_marker_is_written_last_and_a_checkpoint_may_be_removed_meanwhile(bucket, run):
    uploader = Uploader(URL, HASTY)
    checkpoint, written = save(run, 5), []

    def write_file(url, path):
        if not written:
            remove(checkpoint)
        real(url, path)
        written.append(url.removeprefix(f"{URL}/"))

    real, uploader.store.write_file = uploader.store.write_file, write_file
    uploader(checkpoint)
    uploader.close()
    assert written == [
        "config.json",
        "ds_config.json",
        "tokenizer.model",
        "checkpoints/step-00000005/shards/0.safetensors",
        "checkpoints/step-00000005/state.json",
        "checkpoints/step-00000005/complete.json",
    ]
    assert not checkpoint.exists()
    assert len(keys(bucket)) == len(written)


def test_a_copy_that_fails_is_one_warning_and_the_next_one_is_made(bucket, run, capsys, monkeypatch):
    uploader = Uploader(URL, HASTY)
    real, broken = uploader.store.write_file, iter([True, False, True, True])

    def write_file(url, path):
        # One try that fails is repeated; a file that fails at every try ends the copy.
        if "shards" in url and next(broken, False):
            raise s3.Transient(f"{url}: no route")
        real(url, path)

    uploader.store.write_file = write_file
    for step in (5, 10):
        uploader(save(run, step))
        uploader._last[1].result()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"warning: {run}/checkpoints/step-00000010 was not copied to {URL}: ")
    uploader(save(run, 15))
    uploader.close()
    markers = [key for key in keys(bucket) if key.endswith("complete.json")]
    assert [key.split("/")[-2] for key in markers] == ["step-00000005", "step-00000015"]


def test_a_bucket_that_is_not_there_does_not_end_a_run(bucket, run, capsys):
    uploader = Uploader("s3://nowhere/a", HASTY)
    uploader(save(run, 5))
    uploader.close()
    assert "was not copied to s3://nowhere/a" in capsys.readouterr().out


def test_what_arrives_otherwise_than_it_was_sent_is_noticed(bucket, tmp_path):
    store, path = s3.S3Store(HASTY), tmp_path / "file"
    path.write_bytes(os.urandom(PART + 1))
    real = store._call

    def spoil(operation, url, **arguments):
        answer = real(operation, url, **arguments)
        if operation == "upload_file":
            bucket.put_object(Bucket="weights", Key="x", Body=bytes(PART + 1))
        return answer

    store._call = spoil
    with pytest.raises(s3.Transient, match=r"s3://weights/x: what has arrived is not what .*file holds"):
        store.write_file("s3://weights/x", path)


def test_a_copy_that_is_damaged_or_missing_is_an_error_that_leaves_nothing(bucket, run, tmp_path):
    with pytest.raises(InputError, match="no complete checkpoint there"):
        fetch_newest(URL, tmp_path / "other", HASTY)
    uploader = Uploader(URL, HASTY)
    uploader(save(run, 5))
    uploader.close()
    bucket.put_object(Bucket="weights", Key="runs/a/checkpoints/step-00000005/state.json", Body=b"9\n")
    with pytest.raises(InputError, match=r"step-00000005/state\.json is not what was saved"):
        fetch_newest(URL, tmp_path / "other", HASTY)
    assert list((tmp_path / "other/checkpoints").iterdir()) == []
    assert not find_faults(run / "checkpoints/step-00000005")
    assert json.loads((run / "checkpoints/step-00000005/state.json").read_text()) == 5
    shutil.rmtree(tmp_path / "other")


@pytest.mark.slow
def test_a_run_copies_its_checkpoints_and_goes_on_from_them_elsewhere(bucket, chain, tmp_path):
    script = ROOT / "launch/train_prior.py"
    here = chain.train_prior(tmp_path / "here", "--loop.upload", URL, "--loop.save_every", "1", "--loop.steps", "2")
    start(sys.executable, script, *here[1:])
    there = chain.train_prior(tmp_path / "there", "--loop.steps", "3", "--resume", URL)
    assert "steps 3 to 3" in start(sys.executable, script, *there[1:])
    assert (tmp_path / "there/checkpoints/step-00000003").exists()
