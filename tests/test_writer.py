"""Shards as written: their names, their bytes, and what is left when something fails."""

import errno
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from dalle_ds.config import InputError
from dalle_ds.data import writer
from dalle_ds.data.writer import ShardWriter, format_key, write_shard


def make_sample(i):
    return {"png": bytes([i]) * 10, "txt": f"caption {i}".encode(), "json": b"{}"}


def write(folder, n, samples_per_shard=2, **options):
    with ShardWriter(folder, samples_per_shard, **options) as shards:
        for i in range(n):
            shards.write(make_sample(i))
    return shards


def test_shards_and_keys_are_named_by_number(tmp_path):
    shards = write(tmp_path, 5)
    assert (shards.n_shard, shards.n_sample) == (3, 5)
    assert sorted(os.listdir(tmp_path)) == ["00000.tar", "00001.tar", "00002.tar"]
    with tarfile.open(tmp_path / "00001.tar") as tar:
        assert tar.getnames() == [
            f"{key}.{ext}" for key in ("000010000", "000010001") for ext in ("png", "txt", "json")
        ]
    assert format_key(12, 345) == "000120345"


def test_webdataset_reads_what_was_written(tmp_path):
    write(tmp_path, 2)
    samples = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000001"]
    assert samples[1]["txt"] == b"caption 1"


def test_a_given_key_is_kept(tmp_path):
    with ShardWriter(tmp_path, 10) as shards:
        shards.write({"npy": b"x"}, key="photo-7")
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert tar.getnames() == ["photo-7.npy"]


def test_the_same_samples_make_the_same_bytes(tmp_path):
    write(tmp_path / "a", 3)
    write(tmp_path / "b", 3)
    write_shard(tmp_path / "c", 1, [make_sample(2)])
    for other in ("b", "c"):
        assert (tmp_path / "a" / "00001.tar").read_bytes() == (tmp_path / other / "00001.tar").read_bytes()


def test_a_folder_with_shards_is_refused_unless_overwriting(tmp_path):
    write(tmp_path, 6)
    with pytest.raises(InputError, match=r"already holds shards \(00000.tar"):
        write(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / ".00007.tar.partial").write_bytes(b"left by a run that was killed")
    write(tmp_path, 1, overwrite=True)
    assert os.listdir(tmp_path) == ["00000.tar"]


@pytest.mark.parametrize("samples_per_shard", [0, 10_001])
def test_a_shard_size_that_keys_cannot_number_is_refused(tmp_path, samples_per_shard):
    with pytest.raises(InputError, match="samples_per_shard"):
        ShardWriter(tmp_path, samples_per_shard)


def test_an_exception_leaves_complete_shards_and_nothing_half_written(tmp_path):
    def fail():
        with ShardWriter(tmp_path, 2) as shards:
            for i in range(3):
                shards.write(make_sample(i))
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert os.listdir(tmp_path) == ["00000.tar"]


class FullDisk:
    """A file on a disk with room for `room` bytes more; what does not fit fails when the buffer is written out."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [100, 3 * 1024 + 10, 7 * 1024], ids=["first", "second", "at-the-end"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, room):
    monkeypatch.setattr(writer, "open", lambda *args: FullDisk(open(*args), room), raising=False)  # noqa: SIM115
    with pytest.raises(InputError, match=r"00000.tar: the disk is full") as caught:
        write(tmp_path, 1)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_full_device_is_noticed_even_when_the_buffer_hides_it_until_the_file_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "open", lambda *args: open("/dev/full", "wb"), raising=False)  # noqa: SIM115
    with pytest.raises(InputError, match="the disk is full"):
        write(tmp_path, 1)
    assert os.listdir(tmp_path) == []


def test_overwriting_shards_removes_their_index(tmp_path):
    for text in (b"old", b"new"):
        with ShardWriter(tmp_path, 1, overwrite=True) as writer:
            writer.write({"txt": text})
        assert not (tmp_path / "index.jsonl").exists()
        (tmp_path / "index.jsonl").write_text("")
