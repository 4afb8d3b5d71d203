"""Shards: what a pattern names, and what a tar yields when it is whole, truncated or no tar at all."""

import io
import tarfile
from pathlib import Path

import pytest

from dalle_ds.config import InputError
from dalle_ds.data.shards import BrokenShard, expand, read_shard
from dalle_ds.data.writer import ShardWriter


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def read_until_fault(path: Path) -> tuple[list[dict[str, object]], str]:
    samples = []
    try:
        for sample in read_shard(str(path)):
            samples.append(sample)
    except BrokenShard as fault:
        return samples, str(fault)
    return samples, ""


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        write_tar(tmp_path / name, [])
    (tmp_path / ".00003.tar.partial").touch()
    (tmp_path / "00000_stats.json").touch()
    return tmp_path


def names(shards: list[str]) -> list[str]:
    return [Path(shard).name for shard in shards]


def test_a_folder_names_its_complete_shards_in_order(three: Path) -> None:
    assert names(expand(str(three))) == ["00000.tar", "00001.tar", "00002.tar"]


def test_braces_stars_and_joined_patterns_name_shards(three: Path) -> None:
    assert names(expand(f"{three}/{{00001..00002}}.tar")) == ["00001.tar", "00002.tar"]
    assert names(expand(f"{three}/*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    assert names(expand(f"{three}/00002.tar::{three}/00000.tar")) == ["00002.tar", "00000.tar"]
    assert names(expand(f"file://{three}/00000.tar")) == ["00000.tar"]
    assert names(expand(f"file:{three}")) == ["00000.tar", "00001.tar", "00002.tar"]


@pytest.mark.parametrize(
    "pattern", ["", "missing/{0..2}.tar", "missing", "missing/*.tar", "gs://bucket/0.tar", "{0..2"]
)
def test_a_pattern_that_matches_nothing_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(InputError) as error:
        expand(pattern)
    assert pattern.partition("{")[0] in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no shards match .* give a folder"):
        expand(str(tmp_path))


def test_members_group_by_name_up_to_the_first_dot(tmp_path: Path) -> None:
    members = [("a/1.PNG", b"p"), ("a/1.txt", b"t"), ("a/1.seg.png", b"s"), ("a/2.png", b"q"), ("readme", b"-")]
    path = write_tar(tmp_path / "0.tar", members)
    assert list(read_shard(str(path))) == [
        {"__key__": "a/1", "__url__": str(path), "png": b"p", "txt": b"t", "seg.png": b"s"},
        {"__key__": "a/2", "__url__": str(path), "png": b"q"},
    ]


def test_a_member_that_comes_twice_starts_a_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("1.png", b"old"), ("1.png", b"new"), ("1.txt", b"t")])
    assert [sample["png"] for sample in read_shard(str(path))] == [b"old", b"new"]


def test_compressed_shards_are_read(tmp_path: Path) -> None:
    for kind in ("gz", "bz2", "xz"):
        path = write_tar(tmp_path / f"0.tar.{kind}", [("1.png", b"p")], f"w:{kind}")
        assert [sample["png"] for sample in read_shard(str(path))] == [b"p"]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert read_until_fault(path)[1]


def test_what_the_writer_writes_is_read_back(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for index in range(3):
            writer.write({"png": bytes([index]), "txt": b"t"})
    samples = [sample for shard in expand(str(tmp_path)) for sample in read_shard(shard)]
    assert [(s["__key__"], s["png"]) for s in samples] == [
        ("000000000", b"\0"),
        ("000000001", b"\1"),
        ("000010000", b"\2"),
    ]


def test_a_shard_cut_anywhere_yields_the_samples_before_the_cut_and_says_so(tmp_path: Path) -> None:
    members = [(f"{index}.{kind}", bytes(700)) for index in range(4) for kind in ("png", "txt")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    member_len = 512 + 1024  # a header, and 700 bytes in two blocks
    cut = tmp_path / "cut.tar"
    for length in range(0, len(members) * member_len + 1, 256):
        cut.write_bytes(whole[:length])
        samples, fault = read_until_fault(cut)
        complete = [sample for sample in samples if "png" in sample and "txt" in sample]
        assert fault, f"a cut at {length} went unseen"
        # The padding after a member's bytes is not needed to use them.
        assert len(complete) >= length // (2 * member_len)
        assert all(sample[kind] == bytes(700) for sample in complete for kind in ("png", "txt"))


def test_a_damaged_header_is_a_fault_and_not_the_end(tmp_path: Path) -> None:
    content = bytearray(write_tar(tmp_path / "0.tar", [("1.png", b"p"), ("2.png", b"q")]).read_bytes())
    content[1024 + 100 : 1024 + 110] = b"\xff" * 10
    (tmp_path / "0.tar").write_bytes(content)
    samples, fault = read_until_fault(tmp_path / "0.tar")
    assert [sample["__key__"] for sample in samples] == ["1"]
    assert "damaged" in fault


def test_a_member_cannot_pass_for_what_the_reader_says_of_a_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("1.__key__", b"k"), ("1.png", b"p"), ("1.__url__", b"u")])
    assert list(read_shard(str(path))) == [
        {"__key__": "1", "__url__": str(path), "key__": b"k", "png": b"p", "url__": b"u"}
    ]


def test_a_header_that_names_a_length_beyond_the_file_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    member = tarfile.TarInfo("1.png")
    member.size = 2**27  # less than what is refused unread
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(5000))
    samples, fault = read_until_fault(path)
    assert samples == []
    assert "unexpected end of data" in fault


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 100])
def test_a_file_that_is_no_tar_is_a_fault(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    assert read_until_fault(tmp_path / "0.tar")[0] == []
    assert read_until_fault(tmp_path / "0.tar")[1]
