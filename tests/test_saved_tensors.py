"""Files of torch.save are read without running them: what they hold comes out, what they would do does not happen."""

import os
import pickle
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict

import dall_e
import pytest
import torch

from dalle_ds.config import InputError
from dalle_ds.models.saved_tensors import read_saved_tensors

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(value, path, zipped=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older format looks for the source of classes
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return dall_e.Decoder(n_hid=64, vocab_size=512, n_init=8, n_blk_per_group=1)


@FORMATS
@pytest.mark.parametrize("whole", [True, False], ids=["module", "state-dict"])
def test_a_file_gives_the_state_dict_without_the_package_that_wrote_it(decoder, tmp_path, monkeypatch, whole, zipped):
    path = save(decoder if whole else decoder.state_dict(), tmp_path / "decoder.pkl", zipped)
    for name in [name for name in sys.modules if name.partition(".")[0] == "dall_e"]:
        monkeypatch.setitem(sys.modules, name, None)
    tensors, post_gains = read_saved_tensors(path)
    assert list(tensors) == list(decoder.state_dict())
    for name, tensor in decoder.state_dict().items():
        assert tensors[name].equal(tensor), name
    assert post_gains == ({1 / 16} if whole else set())


@FORMATS
def test_shared_strided_and_narrower_tensors_come_out_as_float32(tmp_path, zipped):
    base = torch.randn(4, 6)
    state = {"base": base, "row": base[1], "turned": base.T, "half": base.half(), "bf16": base.bfloat16()}
    tensors, _ = read_saved_tensors(save(state, tmp_path / "state.pt", zipped))
    for name, tensor in state.items():
        assert tensors[name].equal(tensor.float()), name
        assert tensors[name].is_contiguous()


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("place", ["zip", "legacy", "pickle", "attribute", "legacy-class"])
@pytest.mark.parametrize("function", [os.system, eval, os.mkdir], ids=["system", "eval", "mkdir"])
def test_a_pickle_that_would_run_something_is_refused_by_its_name_and_runs_nothing(tmp_path, function, place):
    trace = tmp_path / "trace"
    argument = {
        os.system: f"touch {trace}",
        eval: f"__import__('os').mkdir({str(trace)!r})",
        os.mkdir: str(trace),
    }[function]
    call, path = Call(function, argument), tmp_path / "encoder.pkl"
    if place == "pickle":
        path.write_bytes(pickle.dumps(call))
    elif place == "attribute":
        module = dall_e.utils.Conv2d(1, 1, 1)
        module.note = call
        save(module, path)
    else:
        save({"blocks.input.w": call}, path, zipped=place == "zip")
    if place == "legacy-class":  # in the second pickle of the file, which says the version of the format
        path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(call, 2))
    with pytest.raises(
        InputError, match=rf"encoder.pkl asks for '\w+\.{function.__name__}'.* nothing of the file"
    ) as e:
        read_saved_tensors(path)
    assert "\n" not in str(e.value)
    assert not trace.exists()
    function(argument)
    assert trace.exists(), "it does leave a trace when it runs"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.nn.Linear(1, 1), r"'torch\.nn\.modules\.linear\.Linear'"),
        ({"w": torch.zeros(2, dtype=torch.int64)}, r"'torch\.LongStorage'"),
        ({"model": {"w": torch.zeros(1)}, "epoch": 3}, "entry 'model' is no tensor but a dict"),
        ([torch.zeros(1)], "holds a list, no module and no state dict"),
        (torch.zeros(1), "holds a TensorRecord, no module"),
    ],
    ids=["other-class", "integers", "checkpoint", "list", "tensor"],
)
def test_what_is_no_state_of_a_released_module_is_refused_saying_what_it_is(tmp_path, value, said):
    with pytest.raises(InputError, match=said):
        read_saved_tensors(save(value, tmp_path / "file.pt"))


@FORMATS
@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((10**6, 10**6), (0, 0), 0),
        ((5,), (1,), 0),
        ((2,), (1,), 3),
        ((2,), (-1,), 1),
        ((2,), (1,), -1),
        ((0,), (1,), 0),
    ],
    ids=["terabytes", "too-long", "past-the-end", "backwards", "before-the-start", "empty"],
)
def test_a_tensor_that_would_reach_outside_its_storage_is_refused(tmp_path, size, stride, offset, zipped):
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.arange(4.0).untyped_storage(), dtype=torch.float32, _internal=True
    )
    made_up = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
    with pytest.raises(InputError, match=r"'w' of shape .* does not fit its data"):
        read_saved_tensors(save({"w": made_up}, tmp_path / "file.pt", zipped))


def test_a_module_inside_itself_is_refused(tmp_path):
    module = torch.nn.Sequential(torch.nn.ReLU())
    module._modules["again"] = module
    with pytest.raises(InputError, match=r"'again' is no module"):
        read_saved_tensors(save(module, tmp_path / "file.pt"))


def test_attributes_that_a_pickle_sets_on_what_it_names_are_gone_with_it(tmp_path, decoder):
    """The opcode BUILD may set attributes of classes; those of one file must not reach the reading of another."""
    conv = b"cdall_e.utils\nConv2d\n"
    path = tmp_path / "first.pkl"
    path.write_bytes(b"\x80\x02" + conv + b"(N}(X\x08\x00\x00\x00_modulesK\x01utb.")
    with pytest.raises(InputError):
        read_saved_tensors(path)
    assert len(read_saved_tensors(save(decoder, tmp_path / "second.pkl")).tensors) == len(decoder.state_dict())


def damaged_copies(data):
    yield "empty", b""
    yield "text", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    yield "page", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "cut-short", data[: len(data) // 2]
    yield "last-byte-missing", data[:-1]
    middle = len(data) // 2
    yield "flipped", data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


@FORMATS
def test_a_damaged_file_or_one_of_another_kind_is_refused_in_one_line(tmp_path, zipped):
    whole = save({"w": torch.randn(1000)}, tmp_path / "whole.pt", zipped).read_bytes()
    for kind, data in damaged_copies(whole):
        path = tmp_path / f"{kind}.pt"
        path.write_bytes(data)
        if kind == "flipped" and not zipped:
            continue  # the older format has no checksums: a number changes, and nothing can tell
        with pytest.raises(InputError, match=r"no whole file of torch\.save") as error:
            read_saved_tensors(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_files_of_other_machines_and_compressed_ones_are_refused(tmp_path):
    path = save({"w": torch.zeros(1)}, tmp_path / "file.pt")
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for changes, compression, said in [
        ({"file/byteorder": b"big"}, zipfile.ZIP_STORED, "big-endian"),
        ({}, zipfile.ZIP_DEFLATED, "compressed"),
    ]:
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in {**records, **changes}.items():
                archive.writestr(name, data)
        with pytest.raises(InputError, match=said):
            read_saved_tensors(path)
    legacy = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}, {}, []]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in legacy) + struct.pack("<q", 0))
    with pytest.raises(InputError, match="big-endian"):
        read_saved_tensors(path)
