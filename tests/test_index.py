"""The index: what it says of a shard, where it lies, when it is made again, and what it notices."""

import io
import json
import tarfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dalle_ds.cli import main
from dalle_ds.config import InputError, ReadConfig
from dalle_ds.data.entry import BLOCK_BYTES, ShardEntry, format_entry, parse_entry
from dalle_ds.data.index import INDEX, make_entry, read_index, write_index
from dalle_ds.data.shards import BrokenShard, UnreadableShard, expand, read_shard
from dalle_ds.data.writer import ShardWriter


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=3) as writer:
        for index in range(7):
            writer.write({"png": bytes([index]) * (600 * index + 1), "txt": b"t", "json": b"{}"})
    return tmp_path


def keys(url, *arguments, **keywords):
    return [sample["__key__"] for sample in read_shard(url, *arguments, **keywords)]


def test_an_entry_comes_back_from_its_line():
    entry = ShardEntry("ü.tar", 3 * BLOCK_BYTES - 5, "ab" * 32, '"e"', (0, 1024, 2**40), (1, 2**32 - 1, 0))
    again = parse_entry(format_entry(entry))
    assert (again.name, again.n_bytes, again.etag, again.n_samples) == ("ü.tar", 3 * BLOCK_BYTES - 5, '"e"', 3)
    assert list(again.offsets) == [0, 1024, 2**40]
    assert list(again.crc32) == [1, 2**32 - 1, 0]
    assert format_entry(again) == format_entry(entry)


def test_reading_from_every_offset_gives_the_samples_from_there_on(shards):
    assert main(["index", str(shards)]) == 0
    urls = expand(str(shards))
    entries = read_index(urls)
    assert [entries[url].n_samples for url in urls] == [3, 3, 1]
    for url in urls:
        whole, offsets = keys(url), entries[url].offsets
        for first, begin in enumerate(offsets):
            assert keys(url, begin) == keys(url, begin, entries[url]) == whole[first:]
            for last in range(first + 1, len(offsets)):
                assert keys(url, begin, entries[url], end=offsets[last]) == whole[first:last]


def test_without_an_index_a_local_shard_is_scanned_to_the_same_offsets(shards):
    urls = expand(str(shards))
    scanned = read_index(urls)
    assert main(["index", str(shards)]) == 0
    indexed = read_index(urls)
    assert [list(scanned[url].offsets) for url in urls] == [list(indexed[url].offsets) for url in urls]
    assert not any(scanned[url].crc32 for url in urls)


def test_long_names_folders_and_stray_members_are_where_offsets_say(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("./", "readme", "a/" + "x" * 150 + ".png", "a/" + "x" * 150 + ".txt", "b.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            member.size = 0 if name.endswith("/") else 700
            archive.addfile(member, io.BytesIO(bytes(700)))
    entry = make_entry(str(path))
    whole = keys(str(path))
    assert len(whole) == entry.n_samples == 3
    assert [keys(str(path), offset, entry)[0] for offset in entry.offsets] == whole


def test_shards_that_have_not_changed_are_not_read_again(shards, capsys):
    assert main(["index", str(shards)]) == 0
    before = (shards / INDEX).read_bytes()
    assert main(["index", str(shards)]) == 0
    assert "0 read, 3 unchanged" in capsys.readouterr().out
    assert (shards / INDEX).read_bytes() == before
    (shards / "00001.tar").write_bytes((shards / "00000.tar").read_bytes())
    assert main(["index", f"{shards}/00001.tar"]) == 0
    assert "1 read, 0 unchanged" in capsys.readouterr().out
    assert len((shards / INDEX).read_text().splitlines()) == 3


def test_a_flipped_byte_and_a_cut_on_the_disk_are_noticed(shards):
    assert main(["index", str(shards)]) == 0
    urls = expand(str(shards))
    entries, content = read_index(urls), bytearray(Path(urls[0]).read_bytes())
    content[700] ^= 1
    Path(urls[0]).write_bytes(content)
    config = ReadConfig(n_attempt=2, backoff_seconds=0)
    with pytest.raises(UnreadableShard, match=r"00000\.tar.*CRC-32"):
        keys(urls[0], 0, entries[urls[0]], config=config)
    Path(urls[1]).write_bytes(Path(urls[1]).read_bytes()[: entries[urls[1]].offsets[2]])  # at a sample's end
    with pytest.raises(UnreadableShard, match=r"00001\.tar: \d+ bytes, the index says"):
        keys(urls[1], 0, entries[urls[1]], config=config)


def test_the_checksum_of_the_whole_serves_where_blocks_have_none(shards):
    url = expand(str(shards))[0]
    made = make_entry(url)
    entry = ShardEntry(made.name, made.n_bytes, made.sha256, None, made.offsets)
    assert len(keys(url, 0, entry)) == 3
    wrong = ShardEntry(made.name, made.n_bytes, "0" * 64, None, made.offsets)
    with pytest.raises(UnreadableShard, match="SHA-256"):
        keys(url, 0, wrong)


def test_a_cut_shard_is_not_indexed_and_a_compressed_one_is_refused(shards, capsys):
    cut = shards / "00000.tar"
    cut.write_bytes(cut.read_bytes()[:2000])
    assert main(["index", str(shards)]) == 2
    assert "1 of 3 shards cannot be indexed" in capsys.readouterr().err
    assert len((shards / INDEX).read_text().splitlines()) == 2
    with tarfile.open(shards / "1.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.png"))
    with pytest.raises(BrokenShard, match="compressed"):
        make_entry(str(shards / "1.tar.gz"))


@pytest.mark.parametrize("line", ["{", "[]", '{"name": "0.tar"}', "\x00"])
def test_an_index_that_does_not_parse_is_an_input_error_with_its_line(shards, line):
    assert main(["index", str(shards)]) == 0
    with (shards / INDEX).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=r"index\.jsonl, line 4: .*run dalle-ds index"):
        read_index(expand(str(shards)))


def test_numbers_that_contradict_each_other_are_refused(shards):
    values = json.loads(format_entry(make_entry(str(shards / "00000.tar"))))
    for change in ({"n_samples": 9}, {"n_bytes": 10 * BLOCK_BYTES}):
        with pytest.raises(ValueError, match=r"9 samples|bytes"):
            parse_entry(json.dumps(values | change))


class Ranged(BaseHTTPRequestHandler):
    """A web server that answers ranges, as nginx does; one shard of it does not."""

    def do_GET(self):
        try:
            content = (self.server.folder / self.path.lstrip("/").removeprefix("plain/")).read_bytes()
        except FileNotFoundError:
            self.send_error(404)
            return
        span = self.headers.get("Range")
        if span and not self.path.startswith("/plain"):
            first, last = span.removeprefix("bytes=").split("-")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[int(first) : int(last) + 1]
        else:
            self.send_response(200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_shards_behind_http_are_read_with_the_index_that_was_put_beside_them(shards):
    assert main(["index", str(shards)]) == 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranged)
    server.folder = shards
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_address[1]}"
        urls = expand(f"{base}/{{00000..00002}}.tar")
        entries = read_index(urls)
        for url, path in zip(urls, expand(str(shards)), strict=True):
            assert keys(url) == keys(url, 0, entries[url]) == keys(path)
            begin = entries[url].offsets[-1]
            assert keys(url, begin, entries[url]) == keys(path, begin)
        with pytest.raises(UnreadableShard, match="404"):
            keys(f"{base}/9.tar")
        with pytest.raises(UnreadableShard, match="does not answer ranged requests"):
            keys(f"{base}/plain/00000.tar")
        with pytest.raises(InputError, match="no folders"):
            expand(f"{base}/*.tar")
        entry = make_entry(urls[0])
        with pytest.raises(InputError, match="http cannot be written to"):
            write_index([(urls[0], entry)])
    finally:
        server.shutdown()
        server.server_close()
