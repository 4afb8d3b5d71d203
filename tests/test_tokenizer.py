"""The tokenizer: what survives encoding, dropout that follows its generator, and models that are refused."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dalle_ds.config import InputError, TokenizerConfig
from dalle_ds.tokenizer import Tokenizer, train_tokenizer

CAPTIONS = [
    f"A {size} {colour} {shape} at the {place} of the picture"
    for size in ("big", "small")
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "star")
    for place in ("left", "right", "top")
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "new" / "tokenizer.model"
    train_tokenizer(CAPTIONS, TokenizerConfig(vocab_size=340), path)
    return Tokenizer.load(path)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_vocabulary_has_the_size_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 340


def test_small_data_gives_the_size_it_can(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(CAPTIONS, TokenizerConfig(vocab_size=16_384), tmp_path / "t.model")
    assert 300 < tokenizer.vocab_size < 600
    assert len(tokenizer.encode("small yellow circle")) == 3


def test_the_same_captions_make_the_same_model(tmp_path: Path) -> None:
    first, second = (train_tokenizer(CAPTIONS, TokenizerConfig(vocab_size=340), tmp_path / name) for name in "ab")
    assert first.sha256 == second.sha256 == Tokenizer.load(tmp_path / "a").sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("caption", ["A BIG Red Star", "ein Bär, 3 Äpfel!", "snow ☃ 雪 и всё", "  two   spaces "])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.9])
def test_decoding_gives_back_the_caption_in_lower_case(tokenizer: Tokenizer, caption: str, dropout: float) -> None:
    tokens = tokenizer.encode(caption, dropout=dropout, rng=rng())
    assert tokenizer.decode(tokens) == " ".join(caption.lower().split())


def test_dropout_lengthens_captions_as_it_grows(tokenizer: Tokenizer) -> None:
    generator = rng()
    means = [
        np.mean([len(tokenizer.encode(caption, dropout=p, rng=generator)) for caption in CAPTIONS])
        for p in (0.0, 0.1, 0.5, 0.95)
    ]
    assert means == sorted(means)
    assert means[0] < means[1] < 2 * means[0]


def test_dropout_is_a_function_of_its_generator_in_any_thread(tokenizer: Tokenizer) -> None:
    def encode(seed: int) -> list[int]:
        return tokenizer.encode(CAPTIONS[0], dropout=0.5, rng=rng(seed))

    expected = [encode(seed) for seed in range(50)]
    assert len({tuple(tokens) for tokens in expected}) > 10
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(encode, range(50))) == expected


def test_dropout_without_a_generator_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="give rng"):
        tokenizer.encode("a", dropout=0.1)


def test_batches_are_padded_and_long_captions_keep_their_start(tokenizer: Tokenizer) -> None:
    long = " ".join(CAPTIONS)
    tokens, lengths = tokenizer.encode_batch(["red star", "", long], text_len=16)
    assert tokens.shape == (3, 15)
    assert tokens.dtype == lengths.dtype == np.int64
    short = tokenizer.encode("red star")
    assert tokens[0].tolist() == short + [0] * (15 - len(short))
    assert lengths.tolist() == [len(short), 0, 15]
    assert tokens[2].tolist() == tokenizer.encode(long)[:15]


def test_files_that_are_no_tokenizer_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.model: no such tokenizer; make one with dalle-ds train-tokenizer"):
        Tokenizer.load(tmp_path / "missing.model")
    for content in (b"", b"not a model", b"\x89PNG\r\n"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.model: "):
            Tokenizer.load(tmp_path / "bad.model")


def test_too_small_a_vocabulary_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vocab_size 64 is too small: 256 bytes .* need 2\d\d"):
        train_tokenizer(CAPTIONS, TokenizerConfig(vocab_size=64), tmp_path / "t.model")
    with pytest.raises(InputError, match="no caption"):
        train_tokenizer(["", " \n"], TokenizerConfig(vocab_size=340), tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []
