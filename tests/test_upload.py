"""Copies of checkpoints in S3, on a real server: whole and complete, or a warning; and back onto another disk."""

import importlib
import os
import shutil
import signal
import sys
import threading
import time

import boto3
import pytest
import torch
from programs import LIMIT, ROOT, Ranks, start
from s3_faults import S3Server
from test_preemption import last_step, small_batches

from dalle_ds.config import InputError, Preempted, ReadConfig
from dalle_ds.data import s3, upload
from dalle_ds.data.upload import Uploader, fetch_newest, open_upload
from dalle_ds.storage.files import write_json
from dalle_ds.storage.folders import begin, complete_checkpoints, find_faults, publish, remove, step_of
from dalle_ds.storage.pieces import Piece, write_pieces
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
    write_run(tmp_path / "run", {"ds_config.json": {}, "config.json": {"kind": "prior", "config": {}}})
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
    assert "warning" not in capsys.readouterr().out
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

    def write_file(url, path, stopped):
        if not written:
            remove(checkpoint)
        real(url, path, stopped)
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

    def write_file(url, path, stopped):
        # One try that fails is repeated; a file that fails at every try ends the copy.
        if "shards" in url and next(broken, False):
            raise s3.Transient(f"{url}: no route")
        real(url, path, stopped)

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


@pytest.mark.parametrize("error", [InputError("no bucket"), RuntimeError("cannot schedule new futures"), KeyError("x")])
def test_whatever_fails_in_the_background_is_said_and_does_not_end_a_run(bucket, run, capsys, error):
    """Bug: what was no OSError was never seen."""

    def write_file(*_):
        raise error

    with Uploader(URL, HASTY) as uploader:
        uploader.store.write_file = write_file
        uploader(save(run, 5))
    said = capsys.readouterr().out.splitlines()
    assert f"warning: {run}/checkpoints/step-00000005 was not copied to {URL}: {error}" in said


def test_a_bucket_that_is_not_there_does_not_end_a_run(bucket, run, capsys):
    with Uploader("s3://nowhere/a", HASTY) as uploader:
        uploader(save(run, 5))
    assert "was not copied to s3://nowhere/a" in capsys.readouterr().out


def test_a_run_that_is_done_waits_for_its_last_copy(bucket, run, monkeypatch):
    monkeypatch.setattr(upload, "LAST_SECONDS", 0.1)
    with open_upload(URL, HASTY) as uploader:
        real = uploader.store.write_file

        def write_slowly(*arguments):
            time.sleep(0.2)
            real(*arguments)

        uploader.store.write_file = write_slowly
        uploader(save(run, 5))
    assert "runs/a/checkpoints/step-00000005/complete.json" in keys(bucket)


def test_a_run_that_was_asked_to_stop_waits_a_while_and_says_what_was_not_copied(bucket, run, monkeypatch, capsys):
    """A file of many parts, sent slowly: what is under way ends with the part, and what waits does not begin."""
    monkeypatch.setattr(upload, "LAST_SECONDS", 0.5)
    began = threading.Event()

    def send_slowly(client, operation, url, **arguments):
        go_on = arguments.pop("Callback")

        def slowly(n_bytes):
            began.set()
            time.sleep(0.02)
            go_on(n_bytes)

        return real(client, operation, url, **arguments, Callback=slowly)

    def call(self, operation, url, **arguments):
        call_it = send_slowly if operation == "upload_file" else real
        return call_it(self, operation, url, **arguments)

    real = s3.S3Store._call
    monkeypatch.setattr(s3.S3Store, "_call", call)
    started = time.monotonic()

    def run_until_asked():
        with open_upload(URL, HASTY) as uploader:
            uploader(save(run, 5, n=40 * PART // 4))
            assert began.wait(LIMIT)
            uploader(save(run, 10))
            raise Preempted

    with pytest.raises(Preempted):
        run_until_asked()
    assert time.monotonic() - started < 30, "not all the parts"
    said = capsys.readouterr().out.splitlines()
    folder = f"{run}/checkpoints/step-"
    assert said[0] == f"{folder}00000010 is on its way to {URL}: the run waits for it, 0.5 s at most"
    assert sorted(said[1:]) == [
        f"warning: {folder}00000005 was not copied to {URL}: the run ends",
        f"warning: {folder}00000010 was not copied to {URL}: the run ends, and an earlier one is not there yet",
    ]
    assert not (run / "uploading").exists()
    assert [key for key in keys(bucket) if key.endswith("complete.json")] == []


def test_what_a_killed_run_was_copying_is_swept_away(bucket, run):
    """Bug: it stayed for ever, and kept the space of checkpoints that were long removed."""
    (run / "uploading/step-00000005").mkdir(parents=True)
    for url in ("", URL):
        with open_upload(url, HASTY) as uploader:
            assert (uploader is None) == (not url)
            assert (run / "uploading").exists(), "a command that is refused leaves a living run its copy"
    write_run(run, {})
    assert not (run / "uploading").exists()


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


def copy_to_s3(run, *steps):
    for step in steps:
        with Uploader(URL, HASTY) as uploader:
            uploader(save(run, step))


def damage(bucket, step):
    bucket.put_object(Bucket="weights", Key=f"runs/a/checkpoints/step-{step:08d}/state.json", Body=b"9\n")


def steps_of(run):
    return [step_of(checkpoint) for checkpoint in complete_checkpoints(run)]


def test_what_is_damaged_or_missing_there_is_left_out_in_favour_of_the_one_before(bucket, run, tmp_path, capsys):
    other = tmp_path / "other"
    with pytest.raises(InputError, match=r"no complete checkpoint there: give the --loop.upload of the run"):
        fetch_newest(URL, other, HASTY)
    copy_to_s3(run, 5, 10, 15)
    damage(bucket, 15)
    bucket.delete_object(Bucket="weights", Key="runs/a/checkpoints/step-00000010/shards/0.safetensors")
    fetch_newest(URL, other, HASTY)
    assert open_run(other, "auto").name == "step-00000005"
    first, second = (line for line in capsys.readouterr().out.splitlines() if "left out" in line)
    assert first == f"warning: {URL}/checkpoints/step-00000015 is left out, for state.json is not what was saved"
    assert "step-00000010 is left out, for" in second
    assert "shards/0.safetensors" in second
    assert steps_of(other) == [5]
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["step-00000005"]
    damage(bucket, 5)
    fetch_newest(URL, shutil.copytree(run, tmp_path / "own"), HASTY)  # what is here is newer
    for step in (10, 15):
        shutil.rmtree(tmp_path / f"own/checkpoints/step-{step:08d}")
    (tmp_path / "own/checkpoints/step-00000005").rename(tmp_path / "own/checkpoints/step-00000004")
    capsys.readouterr()
    fetch_newest(URL, tmp_path / "own", HASTY)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"warning: {URL}: all 3 checkpoints there are damaged: going on with what {tmp_path / 'own'} holds"
    with pytest.raises(InputError, match="all 3 checkpoints there are damaged"):
        fetch_newest(URL, tmp_path / "third", HASTY)
    assert list((tmp_path / "third/checkpoints").iterdir()) == []


def test_what_is_damaged_here_does_not_count(bucket, run, tmp_path, capsys):
    """Bug: only its name was looked at, and then nothing whole was left."""
    copy_to_s3(run, 5, 10)
    other = shutil.copytree(run, tmp_path / "other")
    for step in (5, 10):
        (other / f"checkpoints/step-{step:08d}/state.json").write_text("spoilt")
    fetch_newest(URL, other, HASTY)
    assert open_run(other, "auto").name == "step-00000010"
    assert find_faults(other / "checkpoints/step-00000010") == []
    assert (other / "checkpoints/corrupt-step-00000010/state.json").read_text() == "spoilt"
    # A damaged one that is newer than what is there is left out when the run goes on.
    (save(other, 20) / "state.json").write_text("spoilt")
    fetch_newest(URL, other, HASTY)
    assert open_run(other, "auto").name == "step-00000010"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"step": 10}'])
def test_a_marker_that_cannot_be_read_there_is_left_out(bucket, run, tmp_path, capsys, text):
    copy_to_s3(run, 5, 10)
    bucket.put_object(Bucket="weights", Key="runs/a/checkpoints/step-00000010/complete.json", Body=text)
    fetch_newest(URL, tmp_path / "other", HASTY)
    assert steps_of(tmp_path / "other") == [5]
    assert "step-00000010 is left out, for its complete.json cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["boto3.exceptions.RetriesExceededError", "s3transfer.exceptions.S3DownloadFailedError"]
)
def test_a_download_that_breaks_off_is_tried_again(bucket, run, tmp_path, monkeypatch, name):
    copy_to_s3(run, 5)
    store, failed, client = s3.S3Store(HASTY), [], s3._client
    module, _, kind = name.rpartition(".")
    error = getattr(importlib.import_module(module), kind)

    class Flaky:
        def __init__(self, client):
            self.client = client

        def __getattr__(self, operation):
            return getattr(self.client, operation)

        def download_file(self, **arguments):
            if not failed:
                failed.append(arguments["Key"])
                raise error(OSError("cut"))
            self.client.download_file(**arguments)

    def flaky(*given):
        return Flaky(client(*given))

    flaky.cache_clear = client.cache_clear
    monkeypatch.setattr(s3, "_client", flaky)
    with pytest.raises(s3.Transient):
        store.read_file(f"{URL}/config.json", tmp_path / "config.json")
    failed.clear()
    fetch_newest(URL, tmp_path / "other", HASTY)
    assert failed
    assert steps_of(tmp_path / "other") == [5]


def test_a_server_that_does_not_answer_is_one_line(monkeypatch, bucket, run):
    def find(self, pattern):
        raise s3.Transient(f"{pattern}: S3 answers 503 SlowDown")

    monkeypatch.setattr(s3.S3Store, "find", find)
    with pytest.raises(InputError, match=f"--resume {URL}: ") as error:
        fetch_newest(URL, run, HASTY)
    assert "\n" not in str(error.value)


def kill_after(n, folder):
    """Kills this process at the operation after so many on files of the folder."""
    seen = []

    def count(event, arguments):
        path = str(arguments[0]) if arguments else ""
        if event in ("open", "os.rename", "os.mkdir", "os.remove") and folder in path:
            seen.append(event)
            if len(seen) > n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fetch_that_is_killed_at_any_point_is_made_anew(bucket, run, tmp_path):
    """Bug: what it left counted as fetched, and the run began at its first step."""
    copy_to_s3(run, 5)
    for n in range(100):
        other = tmp_path / str(n)
        child = os.fork()
        if child == 0:
            kill_after(n, str(other))
            s3._client.cache_clear()
            fetch_newest(URL, other, HASTY)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert steps_of(other) in ([], [5]), n
        fetch_newest(URL, other, HASTY)
        assert open_run(other, "auto") == other / "checkpoints/step-00000005", n
        if not os.WIFSIGNALED(status):
            break
    assert n > 10


@pytest.mark.slow
def test_a_run_copies_its_checkpoints_and_goes_on_from_them_elsewhere(bucket, chain, tmp_path):
    script = ROOT / "launch/train_prior.py"
    here = chain.train_prior(tmp_path / "here", "--loop.upload", URL, "--loop.save_every", "1", "--loop.steps", "2")
    start(sys.executable, script, *here[1:])
    there = chain.train_prior(tmp_path / "there", "--loop.steps", "3", "--resume", URL)
    assert "steps 3 to 3" in start(sys.executable, script, *there[1:])
    assert (tmp_path / "there/checkpoints/step-00000003").exists()


# --- runs -------------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from dalle_ds.data.s3 import S3Store
real = S3Store.write_file

def write_file(*arguments):
    time.sleep({seconds})
    real(*arguments)

S3Store.write_file = write_file
from dalle_ds.cli import main
sys.exit(main(sys.argv[1:]))
"""


def slow_ranks(world_size, seconds, command):
    """`dalle-ds` on ranks of its own, each of whose copies takes so long a file."""
    return Ranks([sys.executable, "-c", SLOW.format(seconds=seconds), *command], world_size)


@pytest.mark.slow
def test_a_copy_that_takes_longer_than_ranks_wait_for_each_other_is_no_failure(bucket, chain, tmp_path):
    """Bug: the others waited for it in a collective, which ended them, and the watch named a healthy rank."""
    command = chain.train_prior(tmp_path / "run", "--loop.upload", URL, "--loop.timeout_minutes", "0.1")
    with slow_ranks(2, 2.0, command) as ranks:  # nine files, a limit of six seconds
        codes, said = ranks.ended()
    assert codes == [0, 0], said
    assert "error" not in "".join(said)
    assert "runs/a/checkpoints/step-00000003/complete.json" in keys(bucket)


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "is_copied"), [(0.0, True), (9.0, False)])
def test_a_run_that_is_asked_to_stop_copies_its_last_checkpoint_or_says_that_it_did_not(
    bucket, chain, tmp_path, seconds, is_copied
):
    """Bug: it did not, and said nothing."""
    out = tmp_path / "run"
    flags = ["--deepspeed_config", small_batches(chain.root), "--loop.steps", "100000", "--loop.upload", URL]
    with slow_ranks(1, seconds, chain.train_prior(out, *flags)) as run:
        [rank] = run.ranks
        deadline = time.monotonic() + LIMIT
        while last_step(out) < 3:
            assert time.monotonic() < deadline
            assert rank.poll() is None, run.ended()
            time.sleep(0.02)
        rank.send_signal(signal.SIGTERM)
        began = time.monotonic()
        [code], [said] = run.ended()
    assert time.monotonic() - began < upload.LAST_SECONDS + 20
    assert code == 85, said
    step = last_step(out)
    assert (f"runs/a/checkpoints/step-{step:08d}/complete.json" in keys(bucket)) == is_copied
    assert (f"checkpoints/step-{step:08d} was not copied to {URL}: the run ends" in said) != is_copied
    assert f"saved step {step}; go on with --resume auto" in said
    assert "Traceback" not in said
    assert not (out / "uploading").exists()
