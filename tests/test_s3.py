"""S3 shards from a real server, with faults on the way: every sample once and bit-equal, or an error with the shard."""

import dataclasses
import io
import os
import random
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from s3_faults import FAULTS, FaultyProxy, S3Server

from dalle_ds.cli import main
from dalle_ds.config import InputError, ReadConfig
from dalle_ds.data import s3
from dalle_ds.data.failure_budget import FailureBudget
from dalle_ds.data.index import index_shards, make_entry, read_index
from dalle_ds.data.shards import UnreadableShard, expand, open_stream, read_shard

N_SHARDS, N_SAMPLES, BLOCK_BYTES = 4, 12, 8192
# Small parts, so that one shard takes several requests; a stall is noticed after this time.
PATIENT = ReadConfig(
    request_bytes=40_000,
    part_bytes=16384,
    n_ahead=4,
    n_attempt=10,
    backoff_seconds=0.01,
    max_backoff_seconds=0.05,
    stall_seconds=0.4,
)
HASTY = ReadConfig(
    request_bytes=40_000, part_bytes=16384, n_attempt=3, backoff_seconds=0.0, max_backoff_seconds=0.0, stall_seconds=0.3
)


def make_tar(shard, n_samples=N_SAMPLES):
    rng, file = random.Random(shard), io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for index in range(n_samples):
            for extension, size in (("png", rng.randrange(1, 9000)), ("txt", rng.randrange(1, 200))):
                member = tarfile.TarInfo(f"{shard:04d}{index:04d}.{extension}")
                member.size = size
                archive.addfile(member, io.BytesIO(rng.randbytes(size)))
    return file.getvalue()


SHARDS = {f"train-{shard:03d}.tar": make_tar(shard) for shard in range(N_SHARDS)}


def samples_of(url, *arguments, **keywords):
    """Key -> members; a key that comes twice fails."""
    samples = list(read_shard(url, *arguments, **keywords))
    keys = Counter(sample["__key__"] for sample in samples)
    assert max(keys.values(), default=1) == 1, keys.most_common(1)
    return [{name: value for name, value in sample.items() if name != "__url__"} for sample in samples]


@pytest.fixture(scope="module")
def server():
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        client = boto3.client("s3", endpoint_url=server.endpoint)
        client.create_bucket(Bucket="pairs")
        for name, content in SHARDS.items():
            client.put_object(Bucket="pairs", Key=f"laion/{name}", Body=content)
        server.client = client
        yield server
    server.close()


@pytest.fixture
def proxy(server, monkeypatch):
    proxy = FaultyProxy(server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()
    s3._client.cache_clear()


@pytest.fixture
def urls():
    return [f"s3://pairs/laion/{name}" for name in SHARDS]


@pytest.fixture(scope="module")
def entries(server, tmp_path_factory):
    """Entries made from the true bytes, on the disk; url -> entry."""
    folder = tmp_path_factory.mktemp("true")
    made = {}
    for name, content in SHARDS.items():
        (folder / name).write_bytes(content)
        made[f"s3://pairs/laion/{name}"] = make_entry(str(folder / name), PATIENT, BLOCK_BYTES)
    return made


@pytest.fixture(scope="module")
def truth(entries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth")
    for name, content in SHARDS.items():
        (folder / name).write_bytes(content)
    return {f"s3://pairs/laion/{name}": samples_of(str(folder / name)) for name in SHARDS}


def test_a_prefix_a_pattern_and_braces_name_the_same_shards(proxy, urls):
    assert expand("s3://pairs/laion/train-{000..003}.tar") == urls
    assert expand("s3://pairs/laion") == expand("s3://pairs/laion/") == urls
    assert expand("s3://pairs/laion/train-00[0-3]*.tar") == urls
    assert expand("s3://pairs/laion/*-002.tar") == urls[2:3]
    with pytest.raises(InputError, match="no shards match"):
        expand("s3://pairs/elsewhere/")
    with pytest.raises(InputError, match="s3://no-such-bucket: not there"):
        expand("s3://no-such-bucket/laion")


def test_samples_come_as_from_the_disk_from_any_offset_and_up_to_any(proxy, urls, entries, truth):
    url = urls[0]
    offsets = entries[url].offsets
    assert len(offsets) == N_SAMPLES
    assert samples_of(url, config=PATIENT) == truth[url]
    for entry in (None, entries[url]):
        for first, last in ((0, N_SAMPLES), (0, 3), (5, 6), (7, N_SAMPLES)):
            end = offsets[last] if last < N_SAMPLES else None
            assert samples_of(url, offsets[first], entry, end=end, config=PATIENT) == truth[url][first:last]


def test_a_range_in_the_middle_asks_for_the_blocks_it_needs_and_no_more(proxy, urls, entries):
    entry = entries[urls[0]]
    begin, end = entry.offsets[4], entry.offsets[5]
    samples_of(urls[0], begin, entry, end=end, config=PATIENT)
    asked = [tuple(map(int, span.removeprefix("bytes=").split("-"))) for _, span in proxy.requests]
    assert min(first for first, _ in asked) >= begin - BLOCK_BYTES
    assert max(last for _, last in asked) < end + BLOCK_BYTES


@pytest.mark.parametrize("kind", FAULTS)
def test_samples_are_whole_in_spite_of_a_fault(proxy, urls, entries, truth, kind):
    proxy.script = [kind] * 3
    for url in urls[:2]:
        assert samples_of(url, 0, entries[url], config=PATIENT) == truth[url]
    assert proxy.injected == {kind: 3}


def test_a_broken_connection_goes_on_at_the_byte_where_it_broke(proxy, urls, entries, monkeypatch):
    monkeypatch.setattr("dalle_ds.data.stream.CHUNK_BYTES", 512)
    proxy.script = ["cut"]
    monkeypatch.setattr(proxy, "place", lambda n_bytes: n_bytes // 2)
    with open_stream(urls[0], 0, 10_000, entries[urls[0]], PATIENT) as file:
        assert file.read() == SHARDS["train-000.tar"][:10_000]
    assert [span for _, span in proxy.requests] == ["bytes=0-16383", "bytes=8192-16383"]


@pytest.mark.parametrize("kind", [*FAULTS, "shorter", "ignored_range"])
def test_a_fault_that_stays_ends_in_an_error_with_the_shard(proxy, urls, entries, truth, kind, monkeypatch):
    proxy.always = {"train-001.tar": kind}
    # Not a byte gets through: one that did would be progress, and the tries be counted anew.
    monkeypatch.setattr(proxy, "place", lambda n_bytes: 0)
    assert samples_of(urls[0], 0, entries[urls[0]], config=PATIENT) == truth[urls[0]]
    samples = read_shard(urls[1], 0, entries[urls[1]], config=HASTY)
    delivered = []
    with pytest.raises(UnreadableShard, match=r"s3://pairs/laion/train-001\.tar") as error:
        delivered.extend({name: value for name, value in one.items() if name != "__url__"} for one in samples)
    assert "\n" not in str(error.value)
    whole = [sample for sample in delivered if {"png", "txt"} <= sample.keys()]
    assert whole == truth[urls[1]][: len(whole)]


def test_wrong_bytes_that_stay_are_never_delivered(proxy, urls, entries, monkeypatch):
    monkeypatch.setattr(proxy, "place", lambda n_bytes: 0)
    proxy.always = {".tar": "wrong"}
    with open_stream(urls[0], 0, None, entries[urls[0]], HASTY) as file:
        with pytest.raises(OSError, match="CRC-32"):
            file.read(1)
        with pytest.raises(OSError, match="CRC-32"):  # nor what lies behind them
            file.read(1)


def test_a_shard_that_changes_under_the_reader_is_noticed(proxy, server, urls):
    server.client.put_object(Bucket="pairs", Key="changing.tar", Body=SHARDS["train-000.tar"])
    samples = read_shard("s3://pairs/changing.tar", config=ReadConfig(request_bytes=4096, part_bytes=4096, n_ahead=1))
    next(samples)
    other = bytearray(SHARDS["train-000.tar"])
    other[600] ^= 1
    server.client.put_object(Bucket="pairs", Key="changing.tar", Body=bytes(other))
    with pytest.raises(UnreadableShard, match=r"changing\.tar: the shard has changed"):
        list(samples)


def test_a_shard_that_is_gone_or_shorter_than_indexed_is_named(proxy, server, urls, entries):
    with pytest.raises(UnreadableShard, match=r"s3://pairs/gone\.tar: not there"):
        list(read_shard("s3://pairs/gone.tar", config=HASTY))
    content = SHARDS["train-000.tar"]
    server.client.put_object(Bucket="pairs", Key="short.tar", Body=content[: entries[urls[0]].offsets[6]])
    with pytest.raises(UnreadableShard, match=r"short\.tar: \d+ bytes, the index says \d+"):
        list(read_shard("s3://pairs/short.tar", 0, entries[urls[0]], config=HASTY))


def test_a_failure_budget_ends_the_run_with_the_shards(proxy):
    budget = FailureBudget(1)
    budget.add("s3://b/0.tar", "s3://b/0.tar: gone")
    budget.add("s3://b/0.tar", "gone again")
    with pytest.raises(InputError, match=r"2 shards .* 1 are allowed: s3://b/0.tar \(gone\); s3://b/1.tar \(cut\)"):
        budget.add("s3://b/1.tar", "cut")


def test_closing_in_the_middle_of_a_stall_is_quick_and_ends_the_thread(proxy, urls):
    config = ReadConfig(part_bytes=4096, n_ahead=3, stall_seconds=60)
    proxy.stall_seconds, proxy.always = 60, {".tar": "stall"}
    file = open_stream(urls[0], config=config)
    while not proxy.injected["stall"]:
        time.sleep(0.01)
    time.sleep(0.2)  # the headers are on their way; then it waits for a byte
    file.close()
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("shard") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_missing_credentials_are_an_input_error_in_one_line(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3._client.cache_clear()
    with pytest.raises(InputError, match="AWS_PROFILE"):
        expand("s3://pairs/laion/")
    s3._client.cache_clear()


def test_an_index_beside_the_shards_in_s3_is_written_read_and_not_made_twice(proxy, server, urls, truth, capsys):
    for name, content in SHARDS.items():
        server.client.put_object(Bucket="pairs", Key=f"indexed/{name}", Body=content)
    pattern = "s3://pairs/indexed/train-{000..003}.tar"
    with pytest.raises(InputError, match="run dalle-ds index"):
        read_index(expand(pattern), PATIENT)
    assert main(["index", pattern]) == 0
    assert "4 read, 0 unchanged" in capsys.readouterr().out
    entries = read_index(expand(pattern), PATIENT)
    for url, name in zip(expand(pattern), SHARDS, strict=True):
        assert samples_of(url, 0, entries[url], config=PATIENT) == truth[f"s3://pairs/laion/{name}"]
    server.client.put_object(Bucket="pairs", Key="indexed/train-002.tar", Body=SHARDS["train-001.tar"])
    with pytest.raises(UnreadableShard, match="changed since it was indexed"):
        samples_of(expand(pattern)[2], 0, entries[expand(pattern)[2]], config=PATIENT)
    assert main(["index", pattern]) == 0
    assert "1 read, 3 unchanged" in capsys.readouterr().out


def test_wrong_bytes_on_the_way_do_not_enter_the_index(proxy, urls, entries):
    proxy.script = ["wrong", "", "wrong"]
    [(url, entry, _)] = index_shards(urls[:1], PATIENT, block_bytes=BLOCK_BYTES)
    assert (entry.sha256, list(entry.crc32)) == (entries[url].sha256, list(entries[url].crc32))
    assert proxy.injected["wrong"]


def test_a_shard_that_cannot_be_indexed_is_named_and_the_others_are_indexed(proxy, server, capsys):
    server.client.put_object(Bucket="pairs", Key="mixed/0.tar", Body=SHARDS["train-000.tar"])
    server.client.put_object(Bucket="pairs", Key="mixed/1.tar", Body=SHARDS["train-001.tar"][:5000])
    assert main(["index", "s3://pairs/mixed/"]) == 2
    assert "1 of 2 shards cannot be indexed: s3://pairs/mixed/1.tar" in capsys.readouterr().err
    assert list(read_index(["s3://pairs/mixed/0.tar"]))


@pytest.mark.slow
def test_a_thousand_faults_lose_no_sample_and_double_none(proxy, urls, entries, truth):
    proxy.rate, proxy.weights, proxy.stall_seconds = 0.6, [3, 3, 3, 0.3, 3], 2.0
    config, n_read = dataclasses.replace(PATIENT, n_attempt=20, stall_seconds=0.3, max_backoff_seconds=0.02), 0
    with ThreadPoolExecutor(N_SHARDS) as readers:
        while proxy.injected.total() < 1000:
            read = readers.map(lambda url: samples_of(url, 0, entries[url], config=config), urls)
            assert dict(zip(urls, read, strict=True)) == truth
            n_read += N_SHARDS
    assert min(proxy.injected[kind] for kind in FAULTS) > 10
    print(f"{proxy.injected.total()} faults in {n_read} shards, {len(proxy.requests)} requests: {dict(proxy.injected)}")
