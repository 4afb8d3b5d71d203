"""`dalle-ds filter`: clean shards, counters, a report, and nothing half-written."""

import hashlib
import json

import boto3
import pytest
from s3_faults import FaultyProxy, S3Server
from test_filters import CAPTION, encoded, picture

from dalle_ds.cli import main
from dalle_ds.data import s3, writer
from dalle_ds.data.sources import open_source
from dalle_ds.data.writer import ShardWriter

CAPTIONS = {
    "fine": f"  {CAPTION}, “quoted” & <b>bold</b>  ",
    "short": "cat",
    "dated": "photographed on 5 March 2014",
    "german": "ein roter Kreis auf einer blauen Wand",
}


def call(*words):
    return main([str(word) for word in ("filter", *words)])


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A folder of pictures: 20 good ones, and one for each of some filters."""
    root = tmp_path_factory.mktemp("raw")

    def put(name, content, caption, truth=None):
        (root / f"{name}.png").write_bytes(content)
        (root / f"{name}.txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
        if truth is not None:
            (root / f"{name}.json").write_text(json.dumps(truth))

    for seed in range(20):
        put(f"a{seed:02}", encoded(picture(seed)), f"{CAPTIONS['fine']} {seed}", {"seed": seed, "name": "ü"})
    for seed, (name, caption) in enumerate(CAPTIONS.items(), 30):
        put(name, encoded(picture(seed)), caption)
    put("same", encoded(picture(3), compress_level=1), "the same pixels once more")
    put("near", encoded(picture(4), "JPEG", quality=40), "nearly the same as another one")
    put("wide", encoded(picture(50, 300, 100)), CAPTION)
    put("cut", encoded(picture(51))[:-200], CAPTION)
    put("latin", encoded(picture(52)), b"caf\xe9 au lait")
    return root


@pytest.fixture(scope="module")
def clean(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("filtered") / "clean"
    assert call(raw, out, "--samples_per_shard", 8) == 0
    return out


def samples(data):
    source = open_source(str(data))
    return [sample for part in source.parts for sample in source.read(part)]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_what_is_kept_goes_through_as_it_was(raw, clean):
    kept = samples(clean)
    wanted = [sample for sample in samples(raw) if sample["key"].startswith(("a", "fine"))]
    assert len(kept) == len(wanted) == 21
    for field in ("image", "caption", "truth"):
        assert [sample[field] for sample in kept] == [sample[field] for sample in wanted]
    assert [path.name for path in sorted(clean.glob("*.tar"))] == ["00000.tar", "00001.tar", "00002.tar"]


def test_the_report_counts_every_sample_once(clean):
    report = json.loads((clean / "report.json").read_text())
    dropped = {row["name"]: row["dropped"] for row in report["filters"] if row["dropped"]}
    assert dropped == {
        "too_short": 1,
        "boilerplate": 1,
        "language": 1,
        "aspect_ratio": 1,
        "undecodable": 1,
        "exact_duplicate": 1,
        "near_duplicate": 1,
    }
    assert (report["read"], report["kept"], report["shards"], report["unreadable"]) == (28, 21, 3, 1)
    assert report["settings"]["max_aspect_ratio"] == 2.0
    lines = [json.loads(line) for line in (clean / "dropped.jsonl").read_text().splitlines()]
    assert {line["key"]: line["filter"] for line in lines} == {
        "short": "too_short",
        "dated": "boilerplate",
        "german": "language",
        "wide": "aspect_ratio",
        "cut": "undecodable",
        "same": "exact_duplicate",
        "near": "near_duplicate",
    }
    [skipped] = map(json.loads, (clean / "skipped.jsonl").read_text().splitlines())
    assert (skipped["key"], skipped["reason"]) == ("latin", "the caption is not UTF-8 (byte 3)")


def test_the_page_shows_examples_and_needs_no_network(clean):
    page = (clean / "report.html").read_text()
    assert page.count("data:image/jpeg") == 7  # all but the one that does not decode, and the twin of the near one
    for words in ("21 of 28 samples kept", "ein roter Kreis", "100% of the caption is boilerplate", "not UTF-8"):
        assert words in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_page_shows_captions_as_text(raw, tmp_path):
    assert call(raw, tmp_path / "out", "--max_characters", 30, "--min_words", 0, "--languages", "") == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>" not in page


@pytest.mark.parametrize("n_worker", [1, 4])
def test_the_same_data_make_the_same_bytes(raw, clean, tmp_path, n_worker):
    assert call(raw, tmp_path / "again", "--samples_per_shard", 8, "--n_worker", n_worker) == 0
    assert digests(tmp_path / "again") == digests(clean)


def test_clean_shards_pass_once_more_without_loss(clean, tmp_path):
    assert call(clean, tmp_path / "twice", "--samples_per_shard", 8) == 0
    tars = [
        {name: of for name, of in digests(folder).items() if name.endswith(".tar")}
        for folder in (clean, tmp_path / "twice")
    ]
    assert tars[0] == tars[1]


def test_a_folder_in_use_is_refused_and_an_earlier_result_is_replaced_on_request(raw, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert call(raw, out) == 2
    assert call(raw, out, "--overwrite") == 2
    assert "not ours to overwrite" in capsys.readouterr().err
    (out / "mine.txt").unlink()
    assert call(raw, out) == 0
    before = digests(out)
    assert call(raw, out) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert digests(out) == before
    assert call(raw, out, "--overwrite", "--min_words", 2) == 0
    assert json.loads((out / "report.json").read_text())["settings"]["min_words"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--min_side", 5_000], "not one of 28 samples passed the filters (24 by too_small)"),
        (["--language_identifier", "none"], "must be one of fasttext"),
        (["--near_duplicate_bits", 30], "near_duplicate_bits 30"),
        (["--max_pixels", 10**9], "max_pixels 1,000,000,000 must be at most 100,000,000"),
        (["--samples_per_shard", 0], "samples_per_shard 0"),
        (["--n_worker", -1], "n_worker -1"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(raw, tmp_path, capsys, flags, said):
    assert call(raw, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_error_half_way_leaves_the_earlier_result(raw, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert call(raw, out) == 0
    before = digests(out)
    plain = ShardWriter.write

    def write(self, sample, key=None):
        if self.n_sample == 10:
            raise OSError(28, "No space left on device")
        plain(self, sample, key)

    monkeypatch.setattr(writer.ShardWriter, "write", write)
    assert call(raw, out, "--overwrite", "--samples_per_shard", 4) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert digests(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_cleared_by_the_next(raw, clean, tmp_path):
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "00007.tar").write_bytes(b"half")
    assert call(raw, tmp_path / "out", "--samples_per_shard", 8) == 0
    assert digests(tmp_path / "out") == digests(clean)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bucket_is_filtered_as_the_same_files_are_or_not_at_all(clean, tmp_path, monkeypatch, capsys):
    server = S3Server()
    proxy = FaultyProxy(server.port)
    try:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=server.endpoint)
        client.create_bucket(Bucket="raw")
        for path in sorted(clean.glob("*.tar")):
            client.put_object(Bucket="raw", Key=path.name, Body=path.read_bytes())
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        hasty = ["--read.n_attempt", 2, "--read.backoff_seconds", 0, "--read.max_backoff_seconds", 0]
        words = ["s3://raw/{00000..00002}.tar", tmp_path / "out", "--samples_per_shard", 8, *hasty]
        proxy.always["00001.tar"] = "slow_down"
        assert call(*words) == 2
        assert "s3://raw/00001.tar" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
        proxy.always.clear()
        assert call(*words) == 0
    finally:
        proxy.close()
        server.close()
        s3._client.cache_clear()
    made, wanted = digests(tmp_path / "out"), digests(clean)
    assert {name: of for name, of in made.items() if name.endswith(".tar")} == {
        name: of for name, of in wanted.items() if name.endswith(".tar")
    }
