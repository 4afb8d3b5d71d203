"""`dalle-ds train-tokenizer`: on shards, on a folder of pictures, and with bad input."""

from pathlib import Path

import pytest

from dalle_ds.cli import main
from dalle_ds.data.writer import ShardWriter
from dalle_ds.tokenizer import Tokenizer

CAPTIONS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("disc", "square", "star")]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    with ShardWriter(tmp_path / "shards", samples_per_shard=4) as writer:
        for caption in CAPTIONS:
            writer.write({"png": b"not looked at", "txt": caption.encode()})
    return str(tmp_path / "shards")


def test_it_writes_a_model_and_says_what_it_made(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "tokenizer.model"
    assert main(["train-tokenizer", "--data", shards, "--out", str(out), "--vocab_size", "1024"]) == 0
    printed = capsys.readouterr().out
    tokenizer = Tokenizer.load(out)
    assert f"{tokenizer.vocab_size:,} pieces (asked for 1,024) from 9 captions" in printed
    assert "3.0 tokens a caption" in printed
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_it_reads_a_folder_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, caption in enumerate(CAPTIONS):
        (pictures / f"{index}.jpg").write_bytes(b"")
        (pictures / f"{index}.txt").write_text(caption)
    (pictures / "stray.jpg").write_bytes(b"")
    arguments = ["train-tokenizer", "--data", str(pictures), "--out", str(tmp_path / "t.model"), "--vocab_size", "300"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "300 pieces" in printed
    assert "left out 1" in printed


def test_of_more_captions_than_it_holds_it_draws_some(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train-tokenizer", "--data", shards, "--out", str(tmp_path / "t.model"), "--vocab_size", "300"]
    assert main([*arguments, "--max_captions", "4"]) == 0
    assert "from 9 captions, 4 of them drawn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "extra", "expected"),
    [
        ("missing-{0..3}.tar", [], "no shard 'missing-0.tar'"),
        ("{shards}", ["--vocab_size", "40"], "vocab_size 40 is too small"),
        ("{shards}", ["--vocab_size", "5"], "vocab_size 5 must be at least 32"),
        ("{shards}", ["--out", "{shards}"], "is a folder"),
        ("{shards}", ["--max_captions", "0"], "--max_captions 0 must be at least 1"),
        ("{shards}", ["--seed", "-1"], "--seed -1 must not be negative"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    shards: str, data: str, extra: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shards).parent
    arguments = ["train-tokenizer", "--data", data, "--out", str(folder / "t.model"), *extra]
    assert main([value.replace("{shards}", shards) for value in arguments]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["shards"]
