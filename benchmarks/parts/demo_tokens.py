"""What `make demo` trains its prior on, held in memory: captions and image tokens of made scenes."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle_ds.data.pipeline import Reader
from dalle_ds.data.token_shards import open_token_source, token_decode
from dalle_ds.tokenizer import Tokenizer

SPLITS = ("train", "validation")
TEXT_LEN = 20  # as the preset `tiny`, of which the demo is
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Samples of a split: text [N, text_len - 1], lengths [N] and codes [N, image_len], all int64."""

    text: Tensor
    lengths: Tensor
    codes: Tensor
    text_vocab_size: int
    image_vocab_size: int
    grid_size: int

    def batch(self, size: int, seed: int, step: int) -> Batch:
        """What is trained on at a step: a function of seed and step alone."""
        rows = torch.from_numpy(np.random.default_rng([seed, step]).integers(len(self.codes), size=size))
        return self.text[rows], self.lengths[rows], self.codes[rows]

    def batches(self, size: int) -> list[Batch]:
        """All of them, in order."""
        columns = (torch.split(column, size) for column in (self.text, self.lengths, self.codes))
        return list(zip(*columns, strict=True))


def is_there(folder: Path) -> bool:
    return all((folder / "tokens" / split / "manifest.json").exists() for split in SPLITS)


@functools.cache
def load(folder: Path, split: str, limit: int | None = None) -> Tokens:
    """The first `limit` samples of a split, as the demo in `folder` has encoded them."""
    source, manifest = open_token_source(str(folder / "tokens" / split))
    tokenizer = Tokenizer.load(str(folder / "tokenizer.model"))
    captions: list[str] = []
    codes = []
    with Reader(source, token_decode(manifest), 256, epochs=1, drop_last=False) as reader:
        for batch in reader:
            captions += batch["caption"]
            codes.append(torch.from_numpy(batch["codes"]).flatten(1))
            if limit is not None and len(captions) >= limit:
                break
    text, lengths = tokenizer.encode_batch(captions, TEXT_LEN, dropout=0.0, rng=np.random.default_rng(0))
    return Tokens(
        text=torch.from_numpy(text)[:limit],
        lengths=torch.from_numpy(lengths)[:limit],
        codes=torch.cat(codes)[:limit],
        text_vocab_size=tokenizer.vocab_size,
        image_vocab_size=manifest.vocab_size,
        grid_size=manifest.grid_size,
    )
