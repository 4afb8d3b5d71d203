"""`dalle-ds encode-images`: shard for shard, over any number of processes, stopped and going on, twice over."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here, run_in_ranks
from helpers import ENVIRONMENT, call_commands, run_distributed
from PIL import Image

from dalle_ds.cli import main
from dalle_ds.commands.import_dvae import write_imported
from dalle_ds.config import DVAEConfig
from dalle_ds.data import encoding
from dalle_ds.data.images import central_random_crop, centre_crop, decode
from dalle_ds.data.shards import read_shard
from dalle_ds.data.token_shards import read_manifest
from dalle_ds.data.writer import ShardWriter
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.weights import load_dvae

SIZE, N_SHARD, PER_SHARD = 32, 5, 4
CONFIG = DVAEConfig(image_size=SIZE, n_hid=8, n_blk_per_group=1, n_init=8, vocab_size=64)
ROOT = Path(__file__).parents[1]


def png(seed: int) -> bytes:
    import io

    content = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((60, 50)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def dvae(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dvae")
    write_imported(folder / "dvae", DVAE(CONFIG), {})
    torch.manual_seed(1)
    write_imported(folder / "other", DVAE(CONFIG), {})
    return folder / "dvae"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Five shards of four; the second has a picture that does not decode, the fourth no picture that does."""
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, PER_SHARD) as writer:
        for i in range(N_SHARD * PER_SHARD):
            broken = i == 5 or i // PER_SHARD == 3
            sample = {"png": b"broken" if broken else png(i), "txt": f"picture {i}".encode()}
            writer.write({**sample, "json": b'{"n": %d}' % i} if i % 2 else sample)
    return folder


def command(dvae, data, out, *more):
    return ["encode-images", "--dvae", dvae, "--data", data, "--out", out, "--batch_size", 3, *more]


@pytest.fixture(scope="module")
def whole(dvae, shards, tmp_path_factory):
    """What one process makes without a stop."""
    out = tmp_path_factory.mktemp("whole") / "tokens"
    run_here(*command(dvae, shards, out))
    return out


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def codes_of(sample):
    import io

    return np.load(io.BytesIO(sample["npy"]))


def test_one_shard_makes_one_shard_with_the_codes_of_the_centre_crop(dvae, shards, whole):
    model = load_dvae(dvae)
    assert sorted(path.name for path in whole.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar", "00004.tar"]
    for name in ("00000.tar", "00004.tar"):
        pairs = list(zip(read_shard(str(shards / name)), read_shard(str(whole / name)), strict=True))
        assert len(pairs) == PER_SHARD
        for before, after in pairs:
            pixels = centre_crop(decode(before["png"]), SIZE)
            expected = model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
            codes = codes_of(after)
            assert codes.dtype == np.uint16
            np.testing.assert_array_equal(codes, expected.numpy())
            assert after["txt"] == before["txt"]
            assert ("json" in after) == ("json" in before)


def test_the_manifest_counts_the_samples_and_the_log_names_what_is_left_out(whole):
    assert read_manifest(str(whole)).n_samples == N_SHARD * PER_SHARD - 5
    lines = [json.loads(line) for line in (whole / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["000010001", *(f"00003000{i}" for i in range(4))]
    assert all("does not decode" in line["reason"] for line in lines)


def test_the_same_command_again_changes_nothing(dvae, shards, whole, capsys):
    before = times(whole)
    run_here(*command(dvae, shards, whole))
    assert "5 of 5 shards were there already" in capsys.readouterr().out
    after = times(whole)
    for name in ("manifest.json", "skipped.jsonl"):  # written anew, the same
        assert after.pop(whole / name) >= before.pop(whole / name)
    assert after == before


def test_a_run_that_is_stopped_goes_on_and_ends_with_the_same_bytes(dvae, shards, whole, tmp_path, monkeypatch):
    out = tmp_path / "tokens"
    n_written, write = 0, encoding.write_shard

    def stopping(folder, index, samples):
        nonlocal n_written
        n_written += 1
        if n_written == 3:
            write(folder, index, samples)
            raise KeyboardInterrupt  # between a shard and its marker
        return write(folder, index, samples)

    with monkeypatch.context() as patched:
        patched.setattr(encoding, "write_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            main([str(word) for word in command(dvae, shards, out)])
    assert not (out / "manifest.json").exists()
    (out / ".00003.tar.partial").write_bytes(b"what a killed process leaves")
    kept = times(out / "encoding")
    run_here(*command(dvae, shards, out))
    assert contents(out) == contents(whole)
    for name in ("00000.json", "00001.json"):
        assert (out / "encoding" / name).stat().st_mtime_ns == kept[out / "encoding" / name]


def test_a_shard_that_is_gone_or_cut_is_made_again(dvae, shards, whole, tmp_path):
    out = tmp_path / "tokens"
    run_here(*command(dvae, shards, out))
    (out / "00000.tar").unlink()
    os.truncate(out / "00002.tar", 1_000)
    (out / "encoding" / "00004.json").write_text('{"unit": ')
    run_here(*command(dvae, shards, out))
    assert contents(out) == contents(whole)


def test_two_processes_make_the_bytes_of_one(dvae, shards, whole, tmp_path):
    out = tmp_path / "tokens"
    ((printed, _),) = run_in_ranks(2, command(dvae, shards, out))
    assert contents(out) == contents(whole)
    assert "this process is done" in printed or "15 samples of" in printed


def test_two_processes_refuse_together(dvae, shards, whole):
    before = times(whole)
    for code, _, err in run_distributed(call_commands, 2, command(dvae, shards, whole, "--augment"))[0]:
        assert code == 2
        assert "already holds shards encoded with augment False" in err
    assert times(whole) == before


@pytest.mark.slow
def test_a_killed_process_leaves_work_that_another_finishes_with_the_same_bytes(dvae, tmp_path):
    data, out, undisturbed = tmp_path / "data", tmp_path / "tokens", tmp_path / "undisturbed"
    with ShardWriter(data, 20) as writer:
        for i in range(400):
            writer.write({"png": png(i), "txt": b"a caption"})
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        [sys.executable, "-m", "dalle_ds.cli", *map(str, command(dvae, data, out))],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("encoding/0*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(list(out.glob("encoding/0*.json"))) < 20
    run_here(*command(dvae, data, out))
    run_here(*command(dvae, data, undisturbed))
    assert contents(out) == contents(undisturbed)


def test_random_crops_follow_listing_2_and_their_seed(dvae, shards, tmp_path):
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    for out, seed in ((first, 1), (second, 1), (other, 2)):
        run_here(*command(dvae, shards, out, "--augment", "--seed", seed))
    assert contents(first) == contents(second)
    assert contents(first)["00000.tar"] != contents(other)["00000.tar"]
    sample, made = next(read_shard(str(shards / "00000.tar"))), next(read_shard(str(first / "00000.tar")))
    pixels = central_random_crop(decode(sample["png"]), SIZE, np.random.default_rng([5, 1, 0, 0]))
    expected = load_dvae(dvae).encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    np.testing.assert_array_equal(codes_of(made), expected.numpy())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--augment"], "already holds shards encoded with augment False, not True"),
        (["--dvae", "{other}"], "already holds shards encoded with dvae_sha256"),
        (["--data", "{data}/00001.tar"], "already holds shards of other data"),
        (["--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["--samples_per_shard", "0"], "--samples_per_shard 0 must lie in"),
    ],
)
def test_an_earlier_run_of_something_else_is_refused_untouched(dvae, shards, whole, capsys, change, words):
    before = times(whole)
    change = [word.format(other=dvae.parent / "other", data=shards) for word in change]
    assert main([str(word) for word in command(dvae, shards, whole, *change)]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert times(whole) == before


def test_shards_of_another_program_are_replaced_only_when_asked(dvae, shards, whole, tmp_path, capsys):
    out = tmp_path / "tokens"
    with ShardWriter(out, 1) as writer:
        for _ in range(7):
            writer.write({"txt": b"else"})
    assert main([str(word) for word in command(dvae, shards, out)]) == 2
    assert "already holds shards of something else (00000.tar)" in capsys.readouterr().err
    run_here(*command(dvae, shards, out, "--overwrite"))
    assert contents(out) == contents(whole)


def test_more_shards_of_the_same_data_are_added(dvae, shards, whole, tmp_path):
    out = tmp_path / "tokens"
    run_here(*command(dvae, f"{shards}/{{00000..00001}}.tar", out))
    assert read_manifest(str(out)).n_samples == 7
    run_here(*command(dvae, shards, out))
    assert contents(out) == contents(whole)


def test_pictures_of_a_folder_share_shards(dvae, tmp_path):
    folder, out = tmp_path / "pictures", tmp_path / "tokens"
    folder.mkdir()
    for i in range(150):
        (folder / f"{i:03d}.png").write_bytes(png(i % 7))
        (folder / f"{i:03d}.txt").write_text(f"picture {i}")
    run_here(*command(dvae, folder, out, "--samples_per_shard", 130))
    captions = [[sample["txt"] for sample in read_shard(str(path))] for path in sorted(out.glob("*.tar"))]
    assert [len(part) for part in captions] == [128, 22]
    assert captions[1][0] == b"picture 128"
