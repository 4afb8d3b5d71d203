"""Sources: captioned pictures from shards and folders, and what is left out of them."""

import json
from pathlib import Path

import pytest

from dalle_ds.config import InputError
from dalle_ds.data.skips import SkipLog
from dalle_ds.data.sources import PICTURES_PER_PART, SOURCES, open_source
from dalle_ds.data.writer import ShardWriter


def write_shards(folder: Path, samples: list[dict[str, bytes]], samples_per_shard: int = 100) -> str:
    with ShardWriter(folder, samples_per_shard) as writer:
        for sample in samples:
            writer.write(sample)
    return str(folder)


def read_all(data: str, log: SkipLog | None = None) -> list[dict[str, object]]:
    source = open_source(data)
    return [sample for part in source.parts for sample in source.read(part, log)]


def test_shards_yield_picture_caption_truth_and_origin(tmp_path: Path) -> None:
    data = write_shards(tmp_path, [{"jpg": b"j", "txt": "\ufeffein Bär \n".encode(), "json": b'{"shape": "disc"}'}])
    assert read_all(data) == [
        {
            "key": "000000000",
            "image": b"j",
            "caption": "ein Bär",
            "truth": {"shape": "disc"},
            "origin": str(tmp_path / "00000.tar"),
        }
    ]


def test_a_caption_in_the_json_stands_in_for_a_missing_txt(tmp_path: Path) -> None:
    data = write_shards(tmp_path, [{"webp": b"w", "json": json.dumps({"caption": "a cat", "url": "u"}).encode()}])
    assert read_all(data)[0]["caption"] == "a cat"


def test_samples_that_lack_something_are_left_out_counted_and_named_once(tmp_path: Path) -> None:
    bad = [
        {"png": b"p"},
        {"txt": b"no picture"},
        {"png": b"p", "txt": b" \n"},
        {"png": b"p", "txt": b"\xff\xfe"},
        {"png": b"p", "txt": b"t", "json": b"{"},
        {"png": b"p", "txt": b"t", "json": b"[]"},
    ]
    data = write_shards(tmp_path / "shards", [*bad, {"png": b"p", "txt": b"good"}])
    log = SkipLog(tmp_path / "run" / "skipped.jsonl")
    assert [sample["caption"] for sample in read_all(data, log) + read_all(data, log)] == ["good", "good"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert log.n_skipped == len(lines) == len(bad)
    assert lines[0] == {"key": "000000000", "origin": f"{data}/00000.tar", "reason": "no caption"}
    assert "left out 6" in log.summary()


def test_a_log_without_anything_left_out_makes_no_file(tmp_path: Path) -> None:
    log = SkipLog(tmp_path / "skipped.jsonl")
    read_all(write_shards(tmp_path / "shards", [{"png": b"p", "txt": b"t"}]), log)
    assert not (tmp_path / "skipped.jsonl").exists()
    assert log.summary() == ""


@pytest.mark.parametrize(
    ("samples", "lack"), [([{"png": b"p"}] * 3, "caption"), ([{"npy": b"n", "txt": b"t"}], "picture")]
)
def test_a_shard_without_any_caption_or_picture_is_refused_by_name(
    tmp_path: Path, samples: list[dict[str, bytes]], lack: str
) -> None:
    with pytest.raises(InputError, match=rf"00000\.tar: no sample has a {lack}"):
        open_source(write_shards(tmp_path, samples))


def test_a_truncated_shard_gives_its_good_samples_and_one_line_in_the_log(tmp_path: Path) -> None:
    write_shards(tmp_path, [{"png": bytes(2000), "txt": b"t"}] * 4)
    shard = tmp_path / "00000.tar"
    shard.write_bytes(shard.read_bytes()[: 4 * 2560 + 100])
    log = SkipLog()
    assert len(read_all(str(tmp_path), log)) == 2 + 1
    assert log.n_skipped == 1
    assert "shard" in log.first
    assert "truncated" in log.first


def test_a_shard_cut_in_its_first_sample_is_no_shard_without_captions(tmp_path: Path) -> None:
    write_shards(tmp_path, [{"png": bytes(2000), "txt": b"t"}])
    shard = tmp_path / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:2600])
    log = SkipLog()
    assert read_all(str(tmp_path), log) == []
    assert log.n_skipped == 2


def test_a_folder_yields_pictures_with_captions_beside_them_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "pets" / "cats").mkdir(parents=True)
    for name, content in {
        "b.png": b"b",
        "b.txt": b"a bird",
        "pets/cats/tom.JPG": b"tom",
        "pets/cats/tom.json": b'{"caption": "a tom cat"}',
        "pets/stray.webp": b"no caption",
        "._b.png": b"what a file manager leaves",
        "notes.md": b"-",
    }.items():
        (tmp_path / name).write_bytes(content)
    log = SkipLog()
    samples = read_all(str(tmp_path), log)
    assert [(s["key"], s["image"], s["caption"]) for s in samples] == [
        ("b", b"b", "a bird"),
        ("pets/cats/tom", b"tom", "a tom cat"),
    ]
    assert samples[1]["origin"] == str(tmp_path / "pets/cats/tom.JPG")
    assert log.first == f"pets/stray of {tmp_path}/pets/stray.webp: no caption"


def test_a_large_folder_is_divided_into_parts(tmp_path: Path) -> None:
    n_pictures = PICTURES_PER_PART + 3
    for index in range(n_pictures):
        (tmp_path / f"{index:04}.png").write_bytes(b"p")
        (tmp_path / f"{index:04}.txt").write_bytes(b"t")
    assert len(open_source(str(tmp_path)).parts) == 2
    assert [sample["key"] for sample in read_all(str(tmp_path))] == [f"{index:04}" for index in range(n_pictures)]


def test_a_picture_removed_after_listing_is_left_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"p")
        (tmp_path / f"{name}.txt").write_bytes(b"t")
    source = open_source(str(tmp_path))
    (tmp_path / "a.png").unlink()
    assert [sample["key"] for sample in source.read(source.parts[0])] == ["b"]


def test_folders_that_cannot_be_used_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither \.tar shards nor pictures"):
        open_source(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"p")
    with pytest.raises(InputError, match=r"1 pictures, none with a caption: put cat\.txt beside cat\.jpg"):
        open_source(str(tmp_path))
    write_shards(tmp_path / "train", [{"png": b"p", "txt": b"t"}])
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"such as .*/train"):
        open_source(str(tmp_path))


def test_every_source_has_the_shape_of_the_table() -> None:
    assert set(SOURCES) == {"shards", "folder"}
