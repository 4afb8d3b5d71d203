"""Our shards and webdataset's are the same format: each side reads what the other one wrote."""

import io
import json

import numpy as np
import pytest
import webdataset
from PIL import Image

from dalle_ds.data.shards import read_shard
from dalle_ds.data.sources import open_source
from dalle_ds.data.writer import ShardWriter


def encode_png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_sample(index: int) -> dict[str, bytes]:
    truth = {"caption": f"picture {index} – café", "index": index}
    return {"png": encode_png(index), "txt": truth["caption"].encode(), "json": json.dumps(truth).encode()}


def test_webdataset_reads_our_shards(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=3) as writer:
        for index in range(5):
            writer.write(make_sample(index))
    urls = [str(tmp_path / "00000.tar"), str(tmp_path / "00001.tar")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [
        "000000000", "000000001", "000000002", "000010000", "000010001"
    ]  # fmt: skip
    for index, sample in enumerate(samples):
        assert sample["txt"] == sample["json"]["caption"] == f"picture {index} – café"
        assert (sample["png"] == index).all()


@pytest.mark.parametrize("folder", ["", "shard-00/"], ids=["plain-keys", "keys-with-a-folder"])
def test_we_read_what_webdataset_writes(tmp_path, folder):
    path = tmp_path / "train-000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for index in range(4):
            writer.write({"__key__": f"{folder}{index:09d}", **make_sample(index)})
    samples = list(read_shard(str(path)))
    assert [sample["__key__"] for sample in samples] == [f"{folder}{index:09d}" for index in range(4)]
    for index, sample in enumerate(samples):
        assert {name: sample[name] for name in ("png", "txt", "json")} == make_sample(index)


def test_shards_of_webdatasets_shard_writer_are_a_source_as_they_are(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "train-%03d.tar"), maxcount=2, verbose=0) as writer:
        for index in range(5):
            truth = {"caption": f"picture {index}", "url": "kept", "width": 8}
            writer.write({"__key__": f"{index:09d}", "jpg": Image.new("RGB", (8, 8)), "json": truth})
    source = open_source(str(tmp_path / "train-{000..002}.tar"))
    samples = [sample for part in source.parts for sample in source.read(part)]
    assert [sample["caption"] for sample in samples] == [f"picture {index}" for index in range(5)]
    assert all(sample["truth"]["url"] == "kept" for sample in samples)
    assert Image.open(io.BytesIO(samples[0]["image"])).format == "JPEG"
