"""What encode-images keeps of its state: units, markers, and when a run counts as done."""

import pytest

from dalle_ds.config import InputError
from dalle_ds.data.encoding import Encoding, Unit, UnitLog, divide
from dalle_ds.data.sources import PATH_SEPARATOR, Source
from dalle_ds.data.token_shards import read_manifest

RECIPE = {"dvae_sha256": "ab", "augment": False, "seed": 0}
SAMPLE = {"npy": b"codes", "txt": b"caption"}
SIZES = {"grid_size": 4, "vocab_size": 100, "dvae": "runs/dvae"}


def source(*parts):
    return Source(list(parts), lambda *_: iter(()), lambda parts: [0] * len(parts))


def make(folder, n=3):
    return Encoding(folder, [Unit(i, (f"s3://pairs/{i}.tar",)) for i in range(n)], RECIPE)


def write(encoding, index, n_samples=2, used=(1, 99), skipped=()):
    log = UnitLog()
    for entry in skipped:
        log.add(*entry)
    return encoding.write(encoding.units[index], [SAMPLE] * n_samples, log, set(used))


def test_each_shard_is_a_unit_and_pictures_of_a_folder_go_together():
    assert divide(source("a.tar", "b.tar"), 5) == [Unit(0, ("a.tar",)), Unit(1, ("b.tar",))]
    parts = [PATH_SEPARATOR.join(["root", *(f"{part}-{i}.png" for i in range(64))]) for part in range(5)]
    units = divide(source(*parts), 130)
    assert [unit.parts for unit in units] == [tuple(parts[0:2]), tuple(parts[2:4]), tuple(parts[4:])]
    assert units[0].name.startswith("root, 128 pictures ")
    assert len({unit.name for unit in units}) == 3


def test_a_mixture_of_folders_and_shards_keeps_them_apart():
    pictures = [PATH_SEPARATOR.join([root, f"{i}.png"]) for root in ("one", "two") for i in range(2)]
    units = divide(source("a.tar", *pictures, "b.tar"), 1_000)
    assert [unit.parts for unit in units] == [("a.tar",), tuple(pictures[:2]), tuple(pictures[2:]), ("b.tar",)]


def test_the_manifest_comes_when_no_unit_is_missing(tmp_path):
    encoding = make(tmp_path)
    assert encoding.begin() == encoding.units
    for index in (2, 0):
        write(encoding, index, used=(index, 50))
        assert encoding.finish(**SIZES) is None
    assert encoding.begin() == [encoding.units[1]]
    write(encoding, 1, n_samples=0, used=(), skipped=[("k", "o", "why")])
    manifest, n_used, log = encoding.finish(**SIZES)
    assert read_manifest(str(tmp_path)) == manifest
    assert (manifest.n_samples, n_used, log.n_skipped) == (4, 3, 1)
    assert encoding.begin() == []
    assert read_manifest(str(tmp_path)) == manifest
    assert not (tmp_path / "00001.tar").exists()


def test_a_folder_with_something_left_to_do_has_no_manifest(tmp_path):
    encoding = make(tmp_path)
    for index in range(3):
        write(encoding, index)
    encoding.finish(**SIZES)
    (tmp_path / "00001.tar").write_bytes(b"cut")
    assert encoding.begin() == [encoding.units[1]]
    assert not (tmp_path / "manifest.json").exists()


def test_data_without_a_usable_sample_leave_only_the_log(tmp_path):
    encoding = make(tmp_path)
    for index in range(3):
        write(encoding, index, n_samples=0, used=(), skipped=[(f"k{index}", "o", "does not decode")])
    with pytest.raises(InputError, match=r"not one of 3 samples can be used: .*does not decode"):
        encoding.finish(**SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.jsonl"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"unit": "s3://pairs/0.tar"}'])
def test_a_damaged_marker_counts_as_none(tmp_path, content):
    encoding = make(tmp_path)
    write(encoding, 0)
    (tmp_path / "encoding" / "00000.json").write_text(content)
    encoding.check()
    assert encoding.begin() == encoding.units


def test_a_unit_of_another_name_is_refused_or_cleared(tmp_path):
    write(make(tmp_path, 4), 3)
    encoding = make(tmp_path, 3)
    with pytest.raises(InputError, match=r"already holds shards of other data \(s3://pairs/3.tar\)"):
        encoding.check()
    encoding.clear()
    encoding.check()
    assert list(tmp_path.iterdir()) == []
