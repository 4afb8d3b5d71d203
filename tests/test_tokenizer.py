"""The tokenizer: what survives encoding, dropout that follows its generator, and models that are refused."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dalle_ds.config import InputError, TokenizerConfig
from dalle_ds.tokenizer import Tokenizer, draw_evenly, train_tokenizer

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


def test_of_a_long_stream_every_caption_is_drawn_as_often_as_any_other() -> None:
    stream = [str(number) for number in range(60)]
    counts = np.zeros(60)
    for seed in range(3_000):
        kept = draw_evenly(iter(stream), 12, rng(seed))
        assert len(set(kept)) == 12
        counts[[int(number) for number in kept]] += 1
    # Each is drawn with probability 1/5: 600 times, and five standard deviations are 110.
    assert np.abs(counts - 600).max() < 110


def test_a_short_stream_is_kept_whole_and_in_order() -> None:
    for n in (3, 4, 10**18):
        assert draw_evenly(iter("abc"), n, rng()) == ["a", "b", "c"]
    assert draw_evenly(iter(()), 3, rng()) == []


def test_a_draw_holds_no_more_than_it_keeps_and_follows_its_seed() -> None:
    def drawn(seed: int) -> list[str]:
        return draw_evenly((str(number) for number in range(200_000)), 10, rng(seed))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    tracemalloc.start()
    drawn(1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # bytes, where the stream itself has ten million


def test_training_on_a_draw_is_a_function_of_captions_and_seed(tmp_path: Path) -> None:
    many = [f"{caption} number {i}" for i in range(20) for caption in CAPTIONS]
    config = TokenizerConfig(vocab_size=340)
    models = [
        train_tokenizer(iter(many), config, tmp_path / "t.model", max_captions=50, seed=seed).sha256
        for seed in (0, 0, 1)
    ]
    assert models[0] == models[1] != models[2]


def test_a_caption_longer_than_the_trainer_takes_is_cut_and_not_lost(tmp_path: Path) -> None:
    long = " ".join(["zebra"] * 2_000)
    tokenizer = train_tokenizer([long, long], TokenizerConfig(vocab_size=300), tmp_path / "t.model")
    assert len(tokenizer.encode("zebra")) == 1


def test_all_of_the_text_states_but_start_of_text_hold_a_caption(tokenizer: Tokenizer) -> None:
    long = " ".join(CAPTIONS * 20)
    tokens, lengths = tokenizer.encode_batch([long], text_len=256, dropout=0.1, rng=rng())
    assert tokens.shape == (1, 255)
    assert lengths.tolist() == [255]
    assert tokens[0].tolist() == tokenizer.encode(long, dropout=0.1, rng=rng())[:255]
