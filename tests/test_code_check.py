"""Codes that do not follow the pictures are found before a data set is encoded; plain pictures are not blamed."""

import numpy as np
import pytest
import torch
from conftest import run_here
from PIL import Image

from dalle_ds.cli import main
from dalle_ds.commands.import_dvae import write_imported
from dalle_ds.config import DVAEConfig, InputError
from dalle_ds.models.code_check import CodeCheck
from dalle_ds.models.dvae import DVAE

B, S, G = 6, 32, 4
WORDS = ["uint8 from 0 to 255", "map_pixels", "trained", "imported"]


def varied(n=B):
    return torch.randint(0, 256, (n, 3, G, G), dtype=torch.uint8).repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_one_token_for_different_pictures_is_refused_with_what_to_check():
    with pytest.raises(InputError, match="every cell of 6 pictures got token 5") as error:
        CodeCheck().see(varied(), torch.full((B, G, G), 5))
    assert all(word in str(error.value) for word in WORDS)
    assert "\n" not in str(error.value)


def test_the_same_tokens_for_different_pictures_are_refused_though_borders_differ():
    """What pixels scaled twice gave in a trained dVAE: one token inside, another along the border of zero padding."""
    grid = torch.ones(G, G, dtype=torch.long)
    grid[1:-1, 1:-1] = 2
    with pytest.raises(InputError, match="each of 6 pictures got the same 16 tokens"):
        CodeCheck().see(varied(), grid.expand(B, G, G))


def test_one_picture_is_enough_to_find_one_token_and_two_batches_of_one_to_find_the_same_tokens():
    with pytest.raises(InputError, match="got token 0"):
        CodeCheck().see(varied(1), torch.zeros(1, G, G))
    check = CodeCheck()
    grid = torch.arange(G * G).view(1, G, G)
    check.see(varied(1), grid)
    assert not check.conclusive
    with pytest.raises(InputError, match="each of 2 pictures"):
        check.see(varied(1), grid)


@pytest.mark.parametrize("kind", ["black", "white", "dark noise", "one picture many times", "bytes of 0 and 1"])
def test_pictures_that_are_alike_may_have_the_same_tokens(kind):
    images = {
        "black": torch.zeros(B, 3, S, S, dtype=torch.uint8),
        "white": torch.full((B, 3, S, S), 255, dtype=torch.uint8),
        "dark noise": torch.randint(0, 20, (B, 3, S, S), dtype=torch.uint8),
        "one picture many times": varied(1).expand(B, -1, -1, -1),
        "bytes of 0 and 1": varied() // 128,
    }[kind]
    codes = torch.arange(G * G).view(1, G, G) if kind == "one picture many times" else torch.zeros(1, G, G)
    check = CodeCheck()
    check.see(images, codes.expand(B, G, G))
    assert not check.conclusive
    with pytest.raises(InputError):  # the question stays open, and a later batch answers it
        check.see(varied(), torch.zeros(B, G, G))


def test_plain_pictures_of_different_colours_have_a_token_each():
    images = torch.arange(0, 240, 40, dtype=torch.uint8).view(B, 1, 1, 1).expand(B, 3, S, S)
    check = CodeCheck()
    check.see(images, torch.arange(B).view(B, 1, 1).expand(B, G, G))
    assert check.conclusive
    check.see(varied(), torch.zeros(B, G, G))  # asked and answered


def test_pixels_that_are_not_bytes_are_refused():
    with pytest.raises(InputError, match=r"torch\.float32 and must be torch\.uint8"):
        CodeCheck().see(varied().float() / 255, torch.zeros(B, G, G))


CONFIG = DVAEConfig(image_size=S, n_hid=8, n_blk_per_group=1, n_init=8, vocab_size=16)


def write_pictures(folder, images):
    folder.mkdir()
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def write_dvae(out, bias=0.0):
    """An untrained dVAE whose token 3 is preferred by `bias`."""
    model = DVAE(CONFIG)
    with torch.no_grad():
        model.encoder.blocks.output.conv.b[3] += bias
    write_imported(out, model, {})
    return out


def test_encode_images_stops_at_a_dvae_that_tells_nothing_apart_and_leaves_nothing(tmp_path, capsys):
    data, dvae = write_pictures(tmp_path / "pictures", varied(20)), write_dvae(tmp_path / "dvae", bias=1e4)
    command = ["encode-images", "--dvae", dvae, "--data", data, "--out", tmp_path / "tokens"]
    assert main([str(word) for word in command]) == 2
    err = capsys.readouterr().err
    assert "every cell of 20 pictures got token 3" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "tokens").exists()


def test_encode_images_takes_black_pictures_with_a_warning_and_counts_the_tokens(tmp_path, capsys):
    data = write_pictures(tmp_path / "pictures", torch.zeros(4, 3, S, S, dtype=torch.uint8))
    run_here("encode-images", "--dvae", write_dvae(tmp_path / "dvae"), "--data", data, "--out", tmp_path / "tokens")
    out = capsys.readouterr().out
    assert "pictures much alike" in out
    assert "4 samples of 4 x 4 tokens" in out
    assert f"of {CONFIG.vocab_size} tokens used" in out
