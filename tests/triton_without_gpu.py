"""Element-wise Triton kernels without a GPU: run by the interpreter, and compiled for GPUs that are not here.

TRITON_INTERPRET counts when triton is imported, for the whole process; so the interpreter is a process of its own.
"""

import contextlib
import os
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}


@contextlib.contextmanager
def interpreting():
    """Yields what calls a function of a test module in a process whose Triton interprets."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):
            pool.submit(torch.set_num_threads, 1).result()
        yield lambda fn, *args, **kwargs: pool.submit(fn, *args, **kwargs).result()


def bits(tensor):
    return tensor.cpu().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def assert_no_spills(kernel, arguments, constants, options, capability, folder):
    """That the kernel compiles for the GPUs of a capability with all it has in registers; returns its code."""
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(folder)):
        cubin = _compile(kernel, arguments, constants, options, capability)
    code = _dump("-sass", cubin, folder)
    assert re.search(r"STACK:(\d+)", _dump("-res-usage", cubin, folder))[1] == "0"
    assert not re.search(r"\b(LDL|STL)\b", code)
    return code


def assert_lean(kernel, arguments, constants, options, capability, folder):
    """That it also reads and writes many entries at a time."""
    code = assert_no_spills(kernel, arguments, constants, options, capability, folder)
    n_scalar = sum(isinstance(argument, torch.Tensor) and argument.dim() == 0 for argument in arguments)
    widths = [load.rpartition(".")[2] for load in re.findall(r"\b(?:LDG|STG)[.\w]*", code)]
    assert sum(width != "128" for width in widths) <= n_scalar, widths


def _compile(kernel, arguments, constants, options, capability):
    """The cubin of the kernel as it would be launched."""
    left = iter(arguments)
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[i,] = "constexpr", constants[name]
            continue
        argument = next(left)
        is_tensor, is_float = isinstance(argument, torch.Tensor), isinstance(argument, float)
        signature[name] = POINTERS[argument.dtype] if is_tensor else "fp32" if is_float else "i32"
        if is_tensor or name == "n":  # else loads are not vectorised, and the kernel is another than the one that runs
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


def _dump(option, cubin, folder):
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout
