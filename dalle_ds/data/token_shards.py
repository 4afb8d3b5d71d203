"""Token shards: what encode-images writes and train-prior reads.

Webdataset tars of `<key>.npy` (uint16 image tokens [grid_size, grid_size]), `<key>.txt` (the caption) and, when there
is one, `<key>.json` (the truth), with a manifest.json in the same folder that says what the tokens mean.
"""

import dataclasses
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dalle_ds.config import InputError, require
from dalle_ds.data import shards as tar_shards
from dalle_ds.data.pipeline import Decode
from dalle_ds.data.skips import BadSample, SkipLog
from dalle_ds.data.sources import Sample, Source, parse_caption, parse_truth
from dalle_ds.flags import from_dict

MANIFEST = "manifest.json"
REMEDY = "make token shards with dalle-ds encode-images"


@dataclass(frozen=True, kw_only=True)
class TokenManifest:
    """What the tokens of a folder are, and which dVAE made them."""

    n_samples: int
    grid_size: int
    vocab_size: int
    dvae: str
    dvae_sha256: str

    def __post_init__(self) -> None:
        for name in ("n_samples", "grid_size", "vocab_size"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 0, f"{MANIFEST}: {name} {value!r} must be a whole number")


def write_manifest(folder: str | Path, manifest: TokenManifest) -> None:
    """Writes manifest.json beside the shards; do it last, for it marks them as complete."""
    path = Path(folder) / MANIFEST
    partial = path.with_name(f".{MANIFEST}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(data: str) -> TokenManifest:
    """The manifest of the folder, or of the folder that holds the shards `data` names.

    Raises InputError when there is none, when it does not parse, or when shards of several folders disagree.
    """
    if os.path.isdir(data):
        folders = [data]
    else:
        shards = tar_shards.expand(data)
        folders = sorted({os.path.dirname(tar_shards.local_path(shard)) or "." for shard in shards})
    first, *others = [_read_one_manifest(folder) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        if dataclasses.replace(other, n_samples=0, dvae="") != dataclasses.replace(first, n_samples=0, dvae=""):
            raise InputError(f"{folder}: its tokens are of another dVAE than those of {folders[0]}; use one of the two")
    return dataclasses.replace(first, n_samples=first.n_samples + sum(other.n_samples for other in others))


def _read_one_manifest(folder: str) -> TokenManifest:
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        raise InputError(f"{folder}: not token shards (no {MANIFEST}): {REMEDY}")
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        if not isinstance(values, dict):
            raise TypeError("no JSON object")
        return from_dict(TokenManifest, values, path)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: not a manifest of token shards ({error}): {REMEDY}") from None


def open_token_source(data: str) -> tuple[Source, TokenManifest]:
    """The source of token shards that `data` names (a folder or a pattern), and its manifest. Raises InputError."""
    manifest = read_manifest(data)
    source = Source(tar_shards.expand(data), read_tokens)
    next(source.read(source.parts[0]), None)
    return source, manifest


def read_tokens(url: str, log: SkipLog) -> Iterator[Sample]:
    """Yields {"key", "codes": bytes of an .npy, "caption", "truth", "origin"} of each sample of one token shard.

    Raises InputError when the whole shard holds no tokens.
    """
    n_seen, n_tokens = 0, 0
    raw_samples = tar_shards.read_shard(url)
    while True:
        try:
            raw = next(raw_samples)
        except StopIteration:
            break
        except tar_shards.BrokenShard as fault:
            log.add("", url, str(fault))
            return
        n_seen += 1
        n_tokens += "npy" in raw
        try:
            if "npy" not in raw:
                raise BadSample("no image tokens (.npy)")
            truth = parse_truth(raw.get("json"))
            caption = parse_caption(raw.get("txt"), truth)
        except BadSample as error:
            log.add(raw["__key__"], url, str(error))
            continue
        yield {"key": raw["__key__"], "codes": raw["npy"], "caption": caption, "truth": truth, "origin": url}
    if n_seen and not n_tokens:
        raise InputError(f"{url}: no sample has image tokens (.npy): {REMEDY}")


def encode_codes(codes: Any) -> bytes:
    """The bytes of the .npy of image tokens [grid_size, grid_size], as uint16."""
    array = np.asarray(codes)
    assert array.ndim == 2
    assert array.min() >= 0
    assert array.max() <= np.iinfo(np.uint16).max
    content = io.BytesIO()
    np.save(content, array.astype(np.uint16), allow_pickle=False)
    return content.getvalue()


def token_decode(manifest: TokenManifest) -> Decode:
    """A `decode` for pipeline.Reader: {"codes": int64 [grid_size, grid_size], "caption", "key"}.

    Tokens that the manifest does not allow are a BadSample.
    """
    shape = (manifest.grid_size, manifest.grid_size)

    def decode_tokens(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        try:
            codes = np.load(io.BytesIO(sample["codes"]), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise BadSample(f"the image tokens do not parse ({error})") from None
        if codes.shape != shape:
            raise BadSample(f"image tokens of shape {list(codes.shape)}, not {list(shape)} as the manifest says")
        if codes.dtype.kind not in "iu" or int(codes.min()) < 0 or int(codes.max()) >= manifest.vocab_size:
            raise BadSample(f"image tokens ({codes.dtype}) outside of 0 .. {manifest.vocab_size - 1}")
        return {"codes": codes.astype(np.int64), "caption": sample["caption"], "key": sample["key"]}

    return decode_tokens
