"""Captions to text tokens: SentencePiece byte-pair encoding, lower-cased, with BPE dropout (section 2.2).

The paper gives the size (16,384) and the dropout (10%, in training). Ours, where it is silent: captions are normalised
by NFKC with case folding; characters outside the vocabulary become bytes, so nothing is unknown. Truncation: of the
256 text states one is start-of-text, so a caption keeps its first 255 tokens (after dropout, in training) and loses the
rest, without a mark.
"""

import hashlib
import io
import math
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from dalle_ds.config import InputError, TokenizerConfig

# SentencePiece leaves out what is longer, in bytes; the rest of such a caption tells nothing new.
MAX_TRAINING_BYTES = 4_000
# SentencePiece has one generator for the process, seeded with 32 bits.
SEED_RANGE = 2**32
_generator_lock = threading.Lock()


class Tokenizer:
    """A trained vocabulary; made by `train_tokenizer` or `Tokenizer.load`. Safe to share between threads."""

    def __init__(self, model: bytes, name: str = "tokenizer model") -> None:
        """Raises InputError, naming `name`, when `model` is no SentencePiece model."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise InputError(f"{name}: not a tokenizer model; make one with dalle-ds train-tokenizer") from None
        self._model = model

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a model file. Raises InputError when it is missing, or no tokenizer model."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such tokenizer; make one with dalle-ds train-tokenizer")
        content = path.read_bytes()
        if not content:
            raise InputError(f"{path}: the file is empty; make a tokenizer with dalle-ds train-tokenizer")
        return cls(content, str(path))

    def save(self, path: str | Path) -> None:
        """Writes the model beside `path` first and then renames it, so that `path` is never half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(self._model)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, caption: str, *, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        """The caption's tokens; with `dropout`, each merge is left out with that probability, drawn from `rng`."""
        if not dropout:
            return list(self._processor.encode(caption))
        if rng is None:
            raise ValueError(f"dropout {dropout} draws random numbers: give rng")
        seed = int(rng.integers(SEED_RANGE))
        with _generator_lock:
            sentencepiece.set_random_generator_seed(seed)
            return list(self._processor.encode(caption, enable_sampling=True, alpha=dropout, nbest_size=-1))

    def encode_batch(
        self,
        captions: Sequence[str],
        text_len: int,
        *,
        dropout: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokens [B, text_len - 1], zero beyond each caption's end, and the captions' lengths [B].

        One of the `text_len` states is start-of-text; a longer caption keeps its first text_len - 1 tokens.
        """
        tokens = np.zeros((len(captions), text_len - 1), dtype=np.int64)
        lengths = np.zeros(len(captions), dtype=np.int64)
        for i, caption in enumerate(captions):
            kept = self.encode(caption, dropout=dropout, rng=rng)[: text_len - 1]
            tokens[i, : len(kept)] = kept
            lengths[i] = len(kept)
        return tokens, lengths

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, lower-cased as it was encoded."""
        return str(self._processor.decode([int(token) for token in tokens]))


def train_tokenizer(
    captions: Iterable[str],
    config: TokenizerConfig,
    path: str | Path,
    *,
    max_captions: int = sys.maxsize,
    seed: int = 0,
) -> Tokenizer:
    """Trains byte-pair encoding on `captions` and saves it to `path`; the same captions make the same bytes.

    All captions are read, once; of more than `max_captions` that many are kept, each with the same chance, drawn by
    `seed`. The vocabulary is smaller than config.vocab_size when the captions yield no more merges. Raises InputError
    when there are no captions, or when the size does not hold the 256 bytes and the captions' characters.
    """
    kept = draw_evenly(_clean(captions), max_captions, np.random.default_rng(seed))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(kept),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc_cf",
            max_sentence_length=MAX_TRAINING_BYTES,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(error, config) from error
    tokenizer = Tokenizer(model.getvalue())
    tokenizer.save(path)
    return tokenizer


def draw_evenly(items: Iterable[str], n: int, rng: np.random.Generator) -> list[str]:
    """At most `n` of a stream of unknown length, each with the same chance; all of a shorter one, in order.

    Vitter's reservoir with jumps (Li's algorithm L): random numbers for the items that are taken, not for each.
    """
    stream = iter(items)
    kept = list(islice(stream, n))
    weight = 1.0
    while len(kept) == n:
        weight *= (1 - rng.random()) ** (1 / n)
        n_passed = math.log(1 - rng.random()) / math.log1p(-min(weight, 1 - np.finfo(float).epsneg))
        found = next(islice(stream, min(int(n_passed), sys.maxsize - 1), None), None)
        if found is None:
            break
        kept[int(rng.integers(n))] = found
    return kept


def _clean(captions: Iterable[str]) -> Iterator[str]:
    for caption in captions:
        # The trainer takes a line for a sentence, and NUL for the end of one.
        text = " ".join(caption.replace("\0", " ").split())
        if text:
            yield text.encode(errors="replace")[:MAX_TRAINING_BYTES].decode(errors="ignore")


def _explain(error: RuntimeError, config: TokenizerConfig) -> Exception:
    message = str(error)
    if "sentences_.empty()" in message:
        return InputError("no caption to train the tokenizer on: check the data's .txt files")
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if needed:
        return InputError(
            f"tokenizer vocab_size {config.vocab_size} is too small: 256 bytes and the characters of these captions "
            f"need {needed[1]}; give --vocab_size {max(512, int(needed[1]) + 256)} or so"
        )
    return error
