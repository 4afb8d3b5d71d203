"""Pieces of parameters: written by some, read by others, in any cut; the file is what safetensors itself reads."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dalle_ds.config import InputError
from dalle_ds.storage import pieces as pieces_module
from dalle_ds.storage.files import measure
from dalle_ds.storage.pieces import DTYPES, Entry, Piece, PieceReader, digest_tensors, write_pieces, write_tensors


def test_a_file_is_what_safetensors_reads_and_its_record_is_that_of_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces_module, "CHUNK", 64)  # several chunks a tensor
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): torch.randint(0, 2, (7, 5), generator=generator).to(dtype)
        for dtype in sorted(DTYPES, key=lambda dtype: -dtype.itemsize)
    }
    tensors["empty"] = torch.empty(0, 3, dtype=torch.uint8)
    tensors["turned"] = torch.arange(6, dtype=torch.uint8).view(2, 3).T
    entries = [Entry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
    record = write_tensors(tmp_path / "file", entries, tensors.values(), {"what": "ever"})
    assert record == measure(tmp_path / "file")
    assert record["size"] == (tmp_path / "file").stat().st_size
    without_metadata = write_tensors(tmp_path / "other", entries, tensors.values())
    assert without_metadata["sha256"] == digest_tensors(entries, tensors.values())
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor)


@pytest.mark.parametrize("n_writers", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16, torch.bfloat16])
def test_any_run_of_elements_is_read_however_they_were_cut(tmp_path, n_writers, dtype):
    whole = torch.arange(20).to(dtype)
    size = -(-20 // n_writers)
    for i in range(n_writers):
        part = whole[i * size : (i + 1) * size]
        pieces = [Piece("a|b.w", "state.exp_avg", i * size, part), Piece("c", "weight", 4 * i, torch.ones(4))]
        write_pieces(tmp_path / str(i), pieces, {"c": {"step": float(i)}} if i else {})
    with PieceReader(sorted(tmp_path.iterdir())) as reader:
        assert reader.kinds("a|b.w") == ["state.exp_avg"]
        assert reader.kinds("nothing") == []
        for begin in range(20):
            for length in range(1, 21 - begin):
                assert torch.equal(reader.read("a|b.w", "state.exp_avg", begin, length), whole[begin : begin + length])


@pytest.mark.parametrize(("begin", "length", "missing"), [(0, 2, "0 to 2"), (1, 9, "1 to 10"), (4, 6, "8 to 10")])
def test_missing_elements_are_an_error_that_names_the_parameter(tmp_path, begin, length, missing):
    pieces = [Piece("w", "weight", 2, torch.ones(6)), Piece("w", "weight", 10, torch.ones(2))]
    write_pieces(tmp_path / "file", pieces, {})
    with PieceReader([tmp_path / "file"]) as reader:
        assert len(reader.read("w", "weight", 3, 5)) == 5
        with pytest.raises(InputError, match=rf"lacks elements {missing} of w \(weight\)"):
            reader.read("w", "weight", begin, length)
        with pytest.raises(InputError, match="of v"):
            reader.read("v", "weight", 0, 1)


SIZES = {"w": 4, "v": 2}


@pytest.mark.parametrize(
    ("sizes", "named"), [({"w": 4}, "v"), ({**SIZES, "u": 1}, "u"), ({**SIZES, "w": 3}, "w"), ({"w": 4, "V": 2}, "V")]
)
def test_pieces_of_another_model_are_an_error_that_names_a_parameter(tmp_path, sizes, named):
    pieces = [Piece("w", "weight", begin, torch.ones(2)) for begin in (0, 2)] + [Piece("v", "weight", 0, torch.ones(2))]
    write_pieces(tmp_path / "file", pieces, {})
    with PieceReader([tmp_path / "file"], "runs/a") as reader:
        reader.check_fit(SIZES)
        with pytest.raises(InputError, match=f"runs/a is of another model: parameter '{named}' does not fit"):
            reader.check_fit(sizes)


def test_a_file_that_is_cut_anywhere_is_an_error_in_one_line_that_names_it(tmp_path):
    write_pieces(tmp_path / "file", [Piece("w", "weight", 0, torch.ones(9))], {})
    whole = (tmp_path / "file").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "file").write_bytes(whole[:length])
        with pytest.raises(InputError, match="file is damaged") as error:
            PieceReader([tmp_path / "file"])
        assert "\n" not in str(error.value)


def test_numbers_of_all_writers_come_together(tmp_path):
    write_pieces(tmp_path / "0", [], {"a": {"step": 1.0}})
    write_pieces(tmp_path / "1", [Piece("b", "weight", 0, torch.ones(1))], {"b": {"step": 2.0}})
    with PieceReader(sorted(tmp_path.iterdir())) as reader:
        assert reader.scalars == {"a": {"step": 1.0}, "b": {"step": 2.0}}
    assert json.dumps(reader.scalars)
