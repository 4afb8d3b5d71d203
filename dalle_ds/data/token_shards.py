"""Token shards: what encode-images writes and train-prior reads.

Webdataset tars of `<key>.npy` (uint16 image tokens [grid_size, grid_size]), `<key>.txt` (the caption) and, when there
is one, `<key>.json` (the truth), with a manifest.json in the same folder that says what the tokens mean.
"""

import dataclasses
import io
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dalle_ds.config import InputError, ReadConfig, require
from dalle_ds.data import shards as tar_shards
from dalle_ds.data.mixture import is_mixture, read_mixture
from dalle_ds.data.pipeline import Decode
from dalle_ds.data.retrying import retrying
from dalle_ds.data.skips import BadSample
from dalle_ds.data.sources import Sample, Source, mixed_source, parse_caption, parse_truth, shard_source
from dalle_ds.data.store import Transient, Unreadable
from dalle_ds.flags import from_dict

MANIFEST = "manifest.json"
NO_TOKENS = "no image tokens (.npy)"
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
    # Two processes may be the last to finish, on two machines.
    partial = path.with_name(f".{MANIFEST}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(data: str) -> TokenManifest:
    """The manifest of the folder, or of the folder that holds the shards `data` names.

    Raises InputError when there is none, when it does not parse, or when shards of several folders disagree.
    """
    named = [entry.data for entry in read_mixture(data)] if is_mixture(data) else [data]
    folders = sorted({folder for one in named for folder in _folders_of(one)})
    first, *others = [_read_one_manifest(folder) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        if dataclasses.replace(other, n_samples=0, dvae="") != dataclasses.replace(first, n_samples=0, dvae=""):
            raise InputError(f"{folder}: its tokens are of another dVAE than those of {folders[0]}; use one of the two")
    return dataclasses.replace(first, n_samples=first.n_samples + sum(other.n_samples for other in others))


def _folders_of(data: str) -> list[str]:
    if os.path.isdir(data):
        return [data]
    return [os.path.dirname(tar_shards.local_path(shard)) or "." for shard in tar_shards.expand(data)]


def _read_one_manifest(folder: str) -> TokenManifest:
    path = f"{folder.rstrip('/')}/{MANIFEST}"
    try:
        content = retrying(ReadConfig())(tar_shards.store_of(path, ReadConfig()).read_small, path)
    except (Transient, Unreadable) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if content is None:
        raise InputError(f"{folder}: not token shards (no {MANIFEST}): {REMEDY}")
    try:
        values = json.loads(content)
        if not isinstance(values, dict):
            raise TypeError("no JSON object")
        return from_dict(TokenManifest, values, path)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: not a manifest of token shards ({error}): {REMEDY}") from None


def open_token_source(data: str, config: ReadConfig | None = None) -> tuple[Source, TokenManifest]:
    """The source of token shards that `data` names (a folder, a pattern or a mixture), and its manifest.

    Raises InputError.
    """
    manifest = read_manifest(data)
    if is_mixture(data):
        entries = read_mixture(data)
        sources = [open_token_source(entry.data, config)[0] for entry in entries]
        return mixed_source(sources, [entry.weight for entry in entries]), manifest
    source = shard_source(data, config or ReadConfig(), parse_tokens, {NO_TOKENS: ("image tokens (.npy)", REMEDY)})
    next(source.read(source.parts[0]), None)
    return source, manifest


def parse_tokens(raw: dict[str, Any]) -> Sample:
    """{"codes": bytes of an .npy, "caption", "truth"} of a sample of a token shard. Raises BadSample."""
    if "npy" not in raw:
        raise BadSample(NO_TOKENS)
    truth = parse_truth(raw.get("json"))
    return {"codes": raw["npy"], "caption": parse_caption(raw.get("txt"), truth), "truth": truth}


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
