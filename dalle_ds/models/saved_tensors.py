"""Reads the tensors of what torch.save wrote, a state dict or a whole module, and runs nothing of it.

A pickle is a program that may call whatever it names. Here each name is looked up in a table of records that only hold
what they are given, and any other name is an error. `torch.load(weights_only=True)` has such a table too, but takes no
whole module in the format from before zip archives; so both formats are read here, in one way.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from dalle_ds.config import InputError

# Of the format before zip archives: serialization.py of torch.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
NAME_SHOWN = 100  # characters of a name that a file gives
# What a pickle or an archive that is cut short, damaged or made up may make its reader raise.
DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
)


class SavedTensors(NamedTuple):
    """Tensors by their names in the state dict, float32; and the `post_gain` of every module that has one."""

    tensors: dict[str, Tensor]
    post_gains: set[float]


class StorageRecord(NamedTuple):
    """Where a tensor's numbers lie: `numel` of `dtype` in the storage `key`, beginning at `first`."""

    key: Any
    dtype: Any
    first: Any
    numel: Any


class TensorRecord(NamedTuple):
    """A tensor as the pickle describes it; nothing of it is checked yet."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class ModuleRecord:
    """Stands for a module of any class: its attributes, and no methods."""


def read_saved_tensors(path: Path) -> SavedTensors:
    """The tensors of a file that torch.save wrote, in the zip format or the one before it.

    Raises InputError, in one line, for a file of another kind, a damaged one, and one that names anything but tensors,
    containers and the classes of the released dVAE; nothing in the file has been run then either.
    """
    file = io.BytesIO(path.read_bytes())
    try:
        return _read_archive(path, file) if zipfile.is_zipfile(file) else _read_legacy(path, file)
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(
            f"{path} is no whole file of torch.save ({type(error).__name__}): it is of another kind, damaged or cut "
            "short; get it again, or give a .safetensors file"
        ) from error


def _read_archive(path: Path, file: io.BytesIO) -> SavedTensors:
    """The zip format: NAME/data.pkl, and each storage as NAME/data/KEY, uncompressed."""
    with zipfile.ZipFile(file) as archive:
        records = [info.filename for info in archive.infolist()]
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise InputError(f"{path} is a compressed archive, which torch.save never writes; unpack it first")
        (name,) = {name for name, _, rest in (record.partition("/") for record in records) if rest == "data.pkl"}
        if f"{name}/byteorder" in records and archive.read(f"{name}/byteorder") != b"little":
            raise InputError(f"{path} was saved on a big-endian machine; save it again on a little-endian one")
        root = _Unpickler(path, io.BytesIO(archive.read(f"{name}/data.pkl"))).load()
        return _collect(path, root, lambda storage: archive.read(f"{name}/data/{storage.key}"))


def _read_legacy(path: Path, file: io.BytesIO) -> SavedTensors:
    """The older format: five pickles (magic number, protocol, system, object, storage keys), then the storages."""
    file.seek(0)
    if _Unpickler(path, file).load() != LEGACY_MAGIC or _Unpickler(path, file).load() != LEGACY_PROTOCOL:
        raise pickle.UnpicklingError("no magic number")
    if not _Unpickler(path, file).load()["little_endian"]:
        raise InputError(f"{path} was saved on a big-endian machine; save it again on a little-endian one")
    reader = _Unpickler(path, file)
    root = reader.load()
    storages = {}
    for key in _Unpickler(path, file).load():
        (numel,) = struct.unpack("<q", file.read(8))
        n_byte = numel * reader.dtypes[key].itemsize
        storages[key] = file.read(n_byte)
        if len(storages[key]) != n_byte:
            raise EOFError
    return _collect(path, root, lambda storage: storages[storage.key])


class _Unpickler(pickle.Unpickler):
    """Unpickles into records; a table of its own for each file, since a pickle may set attributes of what it names."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        super().__init__(file)
        self.path = path
        self.table = _inert_table()
        self.dtypes: dict[Any, torch.dtype] = {}  # of the storages met

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.table:
            asked = repr(f"{module}.{name}")[:NAME_SHOWN]
            raise InputError(
                f"{self.path} asks for {asked}, which is no part of a released dVAE: refused, and nothing of the file "
                "was run; get it again from its authors, or give a plain state dict"
            )
        return self.table[module, name]

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid
        if kind == "module":  # (class, its source file, its source)
            return rest[0]
        if kind != "storage":
            raise pickle.UnpicklingError(kind)
        dtype, key, _, numel, *views = rest
        first = 0
        if views and views[0] is not None:
            _, first, numel = views[0]
        self.dtypes[key] = dtype
        return StorageRecord(key, dtype, first, numel)


def _inert_table() -> dict[tuple[str, str], Any]:
    """What a pickle may name: records under the names of the classes and functions that would run otherwise."""
    module = type("Module", (ModuleRecord,), {})
    rebuild: dict[str, Callable[..., Any]] = {
        "_rebuild_tensor": lambda storage, offset, size, stride, *rest: TensorRecord(storage, offset, size, stride),
        "_rebuild_tensor_v2": lambda storage, offset, size, stride, *rest: TensorRecord(storage, offset, size, stride),
        "_rebuild_parameter": lambda tensor, *rest: tensor,
        "_rebuild_parameter_with_state": lambda tensor, *rest: tensor,
    }
    return {
        **{(home, name): module for home, names in MODULES.items() for name in names},
        **{("torch", name): dtype for name, dtype in STORAGES.items()},
        **{("torch._utils", name): function for name, function in rebuild.items()},
        ("torch", "device"): lambda *name: None,
        ("torch", "Size"): tuple,
        ("collections", "OrderedDict"): OrderedDict,
        ("__builtin__", "set"): set,
        ("builtins", "set"): set,
    }


def _collect(path: Path, root: Any, read: Callable[[StorageRecord], bytes]) -> SavedTensors:
    """The tensors of a module or a state dict, each made and checked."""
    post_gains: set[float] = set()
    if isinstance(root, ModuleRecord):
        records = dict(_walk(path, root, "", set(), post_gains))
    elif isinstance(root, dict):
        records = root
    else:
        raise InputError(f"{path} holds a {type(root).__name__}, no module and no state dict; give one of these")
    for name, record in records.items():
        if not isinstance(name, str) or not isinstance(record, TensorRecord):
            raise InputError(
                f"{path}: entry {name!r} is no tensor but a {type(record).__name__}; save the state dict by itself"
            )
    tensors = {name: _make_tensor(path, name, record, read(record.storage)) for name, record in records.items()}
    return SavedTensors(tensors, post_gains)


def _walk(path: Path, module: Any, prefix: str, seen: set[int], post_gains: set[float]) -> Iterator[tuple[str, Any]]:
    """(name in the state dict, record) of all parameters and buffers below `module`."""
    state = vars(module) if isinstance(module, ModuleRecord) else {}
    parts: list[Any] = [state.get(name) for name in ("_parameters", "_buffers", "_modules")]
    # A made-up file may hold a module in itself.
    if id(module) in seen or not all(isinstance(part, dict) for part in parts):
        raise InputError(
            f"{path}: {prefix.rstrip('.') or 'all of it'!r:.100} is no module as torch saves one; get it again"
        )
    seen.add(id(module))
    if isinstance(state.get("post_gain"), float):
        post_gains.add(state["post_gain"])
    for part in parts[:2]:
        yield from ((f"{prefix}{name}", record) for name, record in part.items() if record is not None)
    for name, child in parts[2].items():
        yield from _walk(path, child, f"{prefix}{name}.", seen, post_gains)


def _make_tensor(path: Path, name: str, record: TensorRecord, data: bytes) -> Tensor:
    """The float32 tensor of a record, once its size and strides are seen to stay inside its storage."""
    size, stride, offset = tuple(record.size), tuple(record.stride), record.offset + record.storage.first
    numel = len(data) // record.storage.dtype.itemsize
    # One element past the last; strides of 0 could make terabytes of a few bytes, so the product counts too.
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if min((*size, *stride, offset + 1), default=1) < 1 or max(end, math.prod(size)) > numel:
        raise InputError(f"{path}: parameter {name!r} of shape {list(size)} does not fit its data; get the file again")
    flat = torch.frombuffer(bytearray(data), dtype=record.storage.dtype)
    return flat.as_strided(size, stride, offset).to(torch.float32).clone(memory_format=torch.contiguous_format)


STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
}
# Where the classes of a released encoder or decoder come from, in 2021 and today.
MODULES = {
    "dall_e.encoder": ("Encoder", "EncoderBlock"),
    "dall_e.decoder": ("Decoder", "DecoderBlock"),
    "dall_e.utils": ("Conv2d",),
    "torch.nn.modules.container": ("Sequential",),
    "torch.nn.modules.activation": ("ReLU",),
    "torch.nn.modules.pooling": ("MaxPool2d",),
    "torch.nn.modules.upsampling": ("Upsample",),
    "torch.nn.modules.linear": ("Identity",),
}
